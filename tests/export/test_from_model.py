"""Exports of a model: each format, read back by a reader of its own, against `VLNMSPredictor`."""

import base64
import dataclasses
import json

import exported
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode
from pycocotools import mask as mask_util

from vlnms_d2 import VLNMSPredictor
from vlnms_d2.data.mapper import read_image
from vlnms_d2.export import FORMATS, from_model
from vlnms_d2.export.from_model import ExportSettings, run_export
from vlnms_d2.export.model import detector_classes
from vlnms_d2.export.workers import Processes, one_thread

TOP_N = 6
ALL = ("jsonl", "coco", "per-expression", "mattnet", "nmtree", "ddpn")
CAPTIONED = "exported_captions"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    exported.make_dataset(root)
    exported.register(root)
    DatasetCatalog.register(CAPTIONED, captioned)
    yield root
    DatasetCatalog.remove(exported.DATASET)
    DatasetCatalog.remove(CAPTIONED)


def captioned():
    """The images with six captions each."""
    images = DatasetCatalog.get(exported.DATASET)
    for image in images:
        image["expressions"] = [
            {
                **e,
                "sent_id": 3 * e["sent_id"] + n,
                "split": "train",
                "query": e["query"] + " red" * n,
            }
            for e in image["expressions"]
            for n in range(3)
        ]
    return images


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Models and an export that several tests use, by name, and a folder for them."""
    return {"folder": tmp_path_factory.mktemp("kept")}


@pytest.fixture
def make_settings(config, root, kept, tmp_path):
    """`make_settings(head, relatedness, **settings)`."""

    def make(head="VLNMSHead", relatedness="FC", out=None, **given) -> ExportSettings:
        key = f"{head}_{relatedness}"
        if key not in kept:
            (kept["folder"] / key).mkdir()
            kept[key] = exported.save_model(config(head, relatedness), kept["folder"] / key)
        return ExportSettings(kept[key], out or tmp_path / "out", block_size=2, **given)

    return make


@pytest.fixture
def everything(make_settings, kept):
    """Settings of all formats, and the files of an unbroken run of one process."""
    if "files" not in kept:
        out = kept["folder"] / "whole"
        kept["settings"] = make_settings(out=out, formats=ALL, top_n=TOP_N, masks=True)
        run_export(kept["settings"])
        kept["files"] = exported.files_of(out)
    return kept["settings"], dict(kept["files"])


def predictions(settings, **cut):
    """Per (image, expression) what `VLNMSPredictor` says; `cut` overrides the config's keys."""
    cfg = settings.config("cpu")
    cfg.merge_from_list([word for pair in cut.items() for word in pair])
    predictor = VLNMSPredictor(cfg)
    predictor.model.roi_heads.mask_on = settings.masks
    found = []
    for image in DatasetCatalog.get(settings.model.dataset):
        picture = read_image(image["file_name"], "BGR")
        with one_thread():
            answers = predictor(picture, [e["query"] for e in image["expressions"]])
        for expression, answer in zip(image["expressions"], answers, strict=True):
            found.append((image, expression, answer.to("cpu")))
    return found


def xywh(instances) -> np.ndarray:
    boxes = instances.pred_boxes.tensor.numpy()
    return BoxMode.convert(boxes.copy(), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


def numbers(entries, key) -> np.ndarray:
    return np.array([entry[key] for entry in entries], dtype=np.float32)


def check_jsonl(path, predicted, ids, names, masks):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, (image, expression, found) in zip(lines, predicted, strict=True):
        assert line["image_id"] == image["image_id"]
        assert (line["query_id"], line["query"]) == (expression["sent_id"], expression["query"])
        entries = line["proposals"]
        assert len(entries) == len(found) > 0
        assert np.array_equal(numbers(entries, "box"), found.pred_boxes.tensor.numpy())
        for key, field in (("s", "scores"), ("c", "cls_scores"), ("r", "relatedness")):
            assert np.array_equal(numbers(entries, key), found.get(field).numpy()), key
        assert [e["category_id"] for e in entries] == [ids[c] for c in found.pred_classes]
        assert [e["class"] for e in entries] == [names[c] for c in found.pred_classes]
        if masks:
            decoded = np.stack([mask_util.decode(e["mask"]) for e in entries])
            assert np.array_equal(decoded.astype(bool), found.pred_masks.numpy())


def check_coco(path, predicted, ids, names, masks):
    entries = iter(json.loads(path.read_text()))
    for image, expression, found in predicted:
        own = [next(entries) for _ in range(len(found))]
        assert all(e["image_id"] == image["image_id"] for e in own)
        assert all(e["sent_id"] == expression["sent_id"] for e in own)
        assert np.array_equal(numbers(own, "bbox"), xywh(found))
        assert np.array_equal(numbers(own, "score"), found.scores.numpy())
        assert [e["category_id"] for e in own] == [ids[c] for c in found.pred_classes]
        if masks:
            decoded = np.stack([mask_util.decode(e["segmentation"]) for e in own])
            assert np.array_equal(decoded.astype(bool), found.pred_masks.numpy())
    assert next(entries, None) is None


def check_per_expression(path, predicted, ids, names, masks):
    entries = json.loads(path.read_text())
    assert [e["det_id"] for e in entries] == [e["h5_id"] for e in entries]
    assert [e["det_id"] for e in entries] == list(range(len(entries)))
    entries = iter(entries)
    for image, expression, found in predicted:
        own = [next(entries) for _ in range(len(found))]
        keys = ("ref_id", "sent_id", "image_id", "split")
        expected = {**expression, "image_id": image["image_id"]}
        assert all(e[key] == expected[key] for e in own for key in keys)
        assert np.array_equal(numbers(own, "box"), xywh(found))
        assert [e["category_id"] for e in own] == [ids[c] for c in found.pred_classes]
        assert [e["category_name"] for e in own] == [names[c] for c in found.pred_classes]
    assert next(entries, None) is None


def check_union(path, predicted, ids, names, masks):
    entries = json.loads(path.read_text())
    assert [e["det_id"] for e in entries] == list(range(len(entries)))
    found, expected = {}, {}
    for e in entries:
        key = (*numbers([e], "box")[0].tolist(), e["category_id"], e["category_name"])
        own = found.setdefault(e["image_id"], {})
        assert key not in own, "a repeat"
        own[key] = np.float32(e["score"])
    everything = {}
    for image, _, instances in predicted:
        columns = zip(
            xywh(instances), instances.pred_classes.tolist(), instances.cls_scores.numpy(),
            instances.scores.tolist(), strict=True,
        )  # fmt: skip
        everything.setdefault(image["image_id"], []).extend(columns)
    for image_id, kept in everything.items():
        own = expected.setdefault(image_id, {})
        for box, c, score, *_ in sorted(kept, key=lambda e: (-e[2], -e[3])):
            others = np.array([key[:4] for key in own if key[4] == ids[c]]).reshape(-1, 4)
            overlap = mask_util.iou(box[None].astype(float), others, [0] * len(others))
            if not len(others) or np.max(overlap) <= 0.9:
                own[(*box.tolist(), ids[c], names[c])] = score
    assert found == expected
    by_image = [[e["score"] for e in entries if e["image_id"] == i] for i in expected]
    assert all(scores == sorted(scores, reverse=True) for scores in by_image)


READERS = {
    "jsonl": check_jsonl, "coco": check_coco, "per-expression": check_per_expression,
    "mattnet": check_union, "nmtree": check_union,
}  # fmt: skip


def check(settings, **cut):
    cfg = settings.config("cpu")
    ids, class_names = detector_classes(cfg, exported.DATASET)
    predicted = predictions(settings, **cut)
    for name in settings.formats:
        if name in READERS:
            path = settings.out / FORMATS[name].output
            READERS[name](path, predicted, ids, class_names, settings.masks)


@pytest.mark.parametrize(
    ("head", "relatedness"),
    [("VLNMSHead", "Trans"), ("VLNMSRes5Head", "FC"), ("VLNMSCascadeHead", "FC")],
)
def test_what_is_exported_is_what_the_predictor_gives(make_settings, head, relatedness):
    settings = make_settings(head, relatedness, formats=tuple(READERS), masks=True)
    manifest = run_export(settings)
    check(settings)
    assert manifest["counts"]["images"] == 5 and manifest["counts"]["queries"] == 10
    assert manifest["threshold"] == 0.0


def test_everything_at_once(everything):
    check(everything[0])


def test_cuts(make_settings, tmp_path):
    formats = ("jsonl", "mattnet")
    top = make_settings(out=tmp_path / "top", formats=formats, top_n=3)
    run_export(top)
    check(top, **{"TEST.DETECTIONS_PER_IMAGE": 3})
    scores = [s for *_, found in predictions(top) for s in found.scores.tolist()]
    thresh = float(np.median(scores))
    above = make_settings(out=tmp_path / "above", formats=formats, score_thresh=thresh)
    run_export(above)
    check(above, **{"MODEL.VLNMS.FINAL_SCORE_THRESH": thresh})


@pytest.mark.parametrize("mean", [1, 2.6, 1000])
def test_a_mean_number_of_proposals(make_settings, mean):
    settings = make_settings(formats=("jsonl",), mean_proposals=mean)
    manifest = run_export(settings)
    threshold = manifest["threshold"]
    check(settings, **{"MODEL.VLNMS.FINAL_SCORE_THRESH": threshold})
    others = np.concatenate([found.scores[1:].numpy() for *_, found in predictions(settings)])
    possible = [10 + (others > t).sum() for t in [-1, *others]]
    error = abs(manifest["counts"]["proposals"] - 10 * mean)
    assert error == np.abs(np.array(possible) - 10 * mean).min()


def features_of(settings):
    """Per prediction the features of its boxes, pooled from the image anew: float [K, D]."""
    predictor = VLNMSPredictor(settings.config("cpu"))
    model, head = predictor.model, predictor.model.roi_heads
    encoder = head.box_head if settings.layer == "detector" else head.vlnms.visual_encoder
    for image, _, found in predictions(settings):
        picture = read_image(image["file_name"], "BGR")
        with torch.no_grad():
            images = model.preprocess_image([predictor.prepare(picture)])
            maps = model.backbone(images.tensor)
            scale = np.array(images.image_sizes[0])[::-1] / picture.shape[1::-1]
            boxes = Boxes(found.pred_boxes.tensor * torch.tensor([*scale, *scale]).float())
            pooled = head.box_pooler([maps[f] for f in head.box_in_features], [boxes])
            yield encoder(pooled).numpy()


@pytest.mark.parametrize("layer", ["detector", "relatedness"])
def test_ddpn_scan_and_imram_have_the_features_of_the_boxes(make_settings, layer):
    settings = make_settings(formats=("ddpn", "scan", "imram"), top_n=TOP_N, layer=layer)
    model = dataclasses.replace(settings.model, dataset=CAPTIONED)
    settings = dataclasses.replace(settings, model=model)
    run_export(settings)
    folder, scan = settings.out / "ddpn", settings.out / "scan"
    rows = np.load(scan / "train_ims.npy")
    assert np.array_equal(rows, np.load(settings.out / "imram" / "train_feat.npy"))
    num_boxes = np.load(scan / "train_num_boxes.npy")
    captions = (scan / "train_caps.txt").read_text().splitlines()
    ids = (scan / "train_query_ids.txt").read_text().split()
    assert rows.shape[:2] == (25, TOP_N) and len(captions) == 25
    of_image = {}
    predicted = zip(predictions(settings), features_of(settings), strict=True)
    for number, ((image, expression, found), features) in enumerate(predicted):
        name = f"COCO_train2014_{expression['sent_id']:012d}.jpg.npz"
        with np.load(folder / "queries" / name) as own:
            assert np.array_equal(own["bbox"], found.pred_boxes.tensor.numpy())
            assert np.allclose(own["x"], features.T, atol=1e-4, rtol=1e-4)
            assert own["x"].dtype == own["bbox"].dtype == np.float32
            assert (own["num_bbox"], own["image_h"], own["image_w"]) == (len(found), 60, 80)
            union = of_image.setdefault(image["image_id"], {})
            entries = zip(own["bbox"], found.pred_classes.tolist(), own["x"].T, strict=True)
            union.update({(*box.tolist(), c): x for box, c, x in entries})
            place, row = number % 6, number // 6 * 5 + number % 6
            if place < 5:  # the sixth caption is left out
                assert captions[row] == expression["query"]
                assert ids[row] == str(expression["sent_id"])
                assert num_boxes[row] == len(found)
                repeated = own["x"].T[np.arange(TOP_N) % len(found)]
                assert np.array_equal(rows[row], repeated)
    assert len(list((folder / "queries").iterdir())) == 30
    assert len(list((folder / "images").iterdir())) == 5
    for image_id, union in of_image.items():
        with np.load(folder / "images" / f"COCO_train2014_{image_id:012d}.jpg.npz") as own:
            assert int(own["num_bbox"]) == len(own["bbox"]) == own["x"].shape[1] == len(union)
            found = np.concatenate([own["bbox"], own["x"].T], axis=1).tolist()
            assert sorted(found) == sorted([*key[:4], *x.tolist()] for key, x in union.items())


def test_the_tsv_has_the_features_of_ddpns_files(make_settings):
    given = {"tsv_boxes": (1, 3), "tsv_per_query": True, "top_n": TOP_N}
    settings = make_settings(formats=("ddpn", "bottom-up", "albef"), **given)
    run_export(settings)
    lines = (settings.out / "bottom_up.tsv").read_text().splitlines()
    assert len(lines) == 10
    for line in lines:
        query_id, *_, num_boxes, boxes, features = line.split("\t")
        boxes, features = (
            np.frombuffer(base64.b64decode(column), np.float32).reshape(int(num_boxes), -1)
            for column in (boxes, features)
        )
        name = f"COCO_train2014_{int(query_id):012d}.jpg.npz"
        with np.load(settings.out / "ddpn" / "queries" / name) as own:
            x_of = dict(zip(map(tuple, own["bbox"].tolist()), own["x"].T.tolist(), strict=True))
        assert 1 <= len(boxes) <= 3
        assert [x_of[tuple(box)] for box in boxes.tolist()] == features.tolist()
    dets = json.loads((settings.out / "dets.json").read_text())
    assert [int(i) for i in dets] == [i["image_id"] for i in DatasetCatalog.get(exported.DATASET)]


def test_what_retrieval_cannot_read_is_refused_before_the_model_runs(make_settings, monkeypatch):
    monkeypatch.setattr(from_model, "ProposalModel", None)
    settings = make_settings(formats=("scan",), top_n=2)
    with pytest.raises(ValueError, match=r"image \d+ has 2 captions, but the reader takes 5"):
        run_export(settings)
    assert not settings.out.exists()


def test_three_processes_give_the_same_bytes(everything, tmp_path):
    settings, whole = everything
    settings = dataclasses.replace(settings, out=tmp_path / "three")
    run_export(settings, Processes(processes=3))
    assert exported.files_of(settings.out) == whole


def test_killed_runs_go_on_with_nothing_lost_or_doubled(everything, tmp_path, root):
    settings, whole = everything
    settings = dataclasses.replace(settings, out=tmp_path / "killed")
    # Twice in a block of the model's results, twice in the shards of formats, then in the output.
    kills = [(".work/shards", 1), (".work/shards", 2), (".work/shards", 4), (".work/shards", 9)]
    exported.run_with_kills(run_export, root, settings, [*kills, (".", 3)])
    assert exported.files_of(settings.out) == whole


def test_what_is_finished_is_not_made_again(everything, monkeypatch):
    settings, whole = everything
    monkeypatch.setattr(from_model, "ProposalModel", None)
    manifest = run_export(settings)
    assert manifest == json.loads(whole["manifest.json"])
    assert exported.files_of(settings.out) == whole


def test_other_settings_or_weights_need_another_folder_or_overwrite(make_settings, tmp_path):
    settings = make_settings(formats=("coco",), top_n=2)
    run_export(settings)
    other = make_settings(formats=("jsonl",), top_n=2)
    with pytest.raises(ValueError, match=r"settings\.formats is \['coco'\] there, \['jsonl'\]"):
        run_export(other)
    run_export(other, overwrite=True)
    assert {p.name for p in other.out.iterdir()} == {"proposals.jsonl", "manifest.json"}
    content = torch.load(settings.config("cpu").MODEL.WEIGHTS, weights_only=True)
    content["model"]["roi_heads.box_predictor.cls_score.bias"] += 1
    torch.save(content, tmp_path / "weights.pth")
    model = dataclasses.replace(other.model, opts=("MODEL.WEIGHTS", str(tmp_path / "weights.pth")))
    other = dataclasses.replace(other, model=model)
    with pytest.raises(ValueError, match=r"inputs\.weights\.sha256"):
        run_export(other)


def test_the_manifest_says_what_was_made_of_what(everything):
    _, whole = everything
    manifest = json.loads(whole["manifest.json"])
    identity = manifest["identity"]
    assert identity["inputs"]["weights"]["name"] == "weights.pth"
    assert len(identity["inputs"]["weights"]["sha256"]) == 64
    assert identity["config"]["TEST"]["DETECTIONS_PER_IMAGE"] == TOP_N
    assert identity["settings"]["dataset"] == exported.DATASET
    lines = whole["proposals.jsonl"].splitlines()
    proposals = sum(len(json.loads(line)["proposals"]) for line in lines)
    counts = manifest["counts"]
    assert counts["proposals"] == proposals and counts["queries"] == len(lines) == 10
    assert counts["queries_without_proposals"] == 0
    assert set(manifest["outputs"]) == {*manifest["published"]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_n": 0}, "top_n is 0"),
        ({"top_n": 3, "score_thresh": 0.1}, "top_n and score_thresh are given"),
        ({"formats": ("coco", "coco")}, "formats are coco, coco"),
        ({"formats": ("ddpn",), "layer": "res4"}, "features are 'res4'"),
        ({"formats": ("mattnet",), "masks": True}, "only jsonl and coco"),
        ({"formats": ("scan",)}, "scan has the same number of boxes"),
        ({"formats": ("imram",)}, "imram has the same number of boxes"),
    ],
)
def test_wrong_settings(make_settings, given, message):
    with pytest.raises(ValueError, match=message):
        make_settings(**given)


def test_wrong_models_and_data_sets(make_settings, tmp_path):
    settings = make_settings()

    def with_model(**changes):
        model = dataclasses.replace(settings.model, **changes)
        return dataclasses.replace(settings, model=model)

    for error, match, wrong in (
        (FileNotFoundError, "no such config file", with_model(config_file=tmp_path / "no.yaml")),
        (ValueError, "no registered data set", with_model(dataset="nothing_val")),
        (ValueError, "MODEL.WEIGHTS is empty", with_model(opts=("MODEL.WEIGHTS", ""))),
        (FileNotFoundError, "no.pth: no such", with_model(opts=("MODEL.WEIGHTS", "no.pth"))),
        (ValueError, "Non-existent", with_model(opts=("MODEL.NONE", "1"))),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            run_export(wrong)
    stock = with_model(opts=("MODEL.ROI_HEADS.NAME", "StandardROIHeads"))
    with pytest.raises(ValueError, match=r"no VL-NMS head .* set MODEL\.ROI_HEADS\.NAME"):
        run_export(stock)
    with pytest.raises(ValueError, match=r"up to 101 proposals .* DDPN has room for 100 boxes"):
        run_export(dataclasses.replace(settings, formats=("ddpn",), top_n=101))
    without_masks = dataclasses.replace(with_model(opts=("MODEL.MASK_ON", "False")), masks=True)
    with pytest.raises(ValueError, match=r"MODEL\.MASK_ON is False"):
        run_export(without_masks)


def test_classes_that_no_data_set_names(make_settings):
    cfg = make_settings().config("cpu")
    ids, names = detector_classes(cfg, exported.DATASET)
    assert ids[-1] == 90 and names[-1] == "toothbrush"
    assert detector_classes(cfg, exported.DATASET, "coco_2017_val") == (ids, names)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7
    with pytest.raises(ValueError, match=r"names of 7 classes .*--categories-of"):
        detector_classes(cfg, exported.DATASET)


def test_an_id_that_is_used_twice_is_named(make_settings):
    images = DatasetCatalog.get(exported.DATASET)
    images[1]["expressions"] = images[0]["expressions"]
    DatasetCatalog.register("twice", lambda: images)
    try:
        settings = make_settings()
        model = dataclasses.replace(settings.model, dataset="twice")
        with pytest.raises(ValueError, match="2 expressions of the id 0"):
            model.images()
    finally:
        DatasetCatalog.remove("twice")
