"""Exports of all (image, caption) pairs, read back and compared with `VLNMSPredictor`."""

import dataclasses
import importlib.util
import json

import exported
import numpy as np
import pytest
import torch
from closeness import assert_rounds_alike
from conftest import REPO
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes

from vlnms_d2 import VLNMSPredictor
from vlnms_d2.data.mapper import read_image
from vlnms_d2.evaluation import pair_retrieval, score_pairs
from vlnms_d2.export import PairStore, pairs
from vlnms_d2.export.pairs import PairSettings, ScoredPool, choose, encode_captions, run_pairs
from vlnms_d2.export.workers import Processes, one_thread
from vlnms_d2.modeling.text import TextFeatures

_SPEC = importlib.util.spec_from_file_location("pairs_tool", REPO / "tools" / "export_pairs.py")
pairs_tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(pairs_tool)

TOP_N = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    exported.make_dataset(root)
    exported.register(root)
    yield root
    DatasetCatalog.remove(exported.DATASET)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Models and an export that several tests use, by name, and a folder for them."""
    return {"folder": tmp_path_factory.mktemp("kept")}


@pytest.fixture
def make_settings(config, root, kept, tmp_path):
    """`make_settings(relatedness, **settings)`."""

    def make(relatedness="FC", out=None, **given) -> PairSettings:
        if relatedness not in kept:
            (kept["folder"] / relatedness).mkdir()
            cfg = config("VLNMSHead", relatedness)
            kept[relatedness] = exported.save_model(cfg, kept["folder"] / relatedness)
        given = {"top_n": TOP_N, **given}
        return PairSettings(kept[relatedness], out or tmp_path / "pairs", **given)

    return make


@pytest.fixture
def whole(make_settings, kept):
    """Settings of an unbroken run with scores, and its files."""
    if "files" not in kept:
        kept["settings"] = make_settings(out=kept["folder"] / "whole", with_scores=True)
        run_pairs(kept["settings"])
        kept["files"] = exported.files_of(kept["settings"].out)
    return kept["settings"], kept["files"]


def check_against_predictor(settings):
    """Every pair, one image with all captions at a time."""
    store = PairStore(settings.out)
    images = DatasetCatalog.get(exported.DATASET)
    captions = [e for image in images for e in image["expressions"]]
    assert store.index.shape == (5, 10, TOP_N) and store.index.dtype == np.uint16
    assert [c.caption_id for c in store.captions] == [e["sent_id"] for e in captions]
    assert [i.image_id for i in store.images] == [image["image_id"] for image in images]
    predictor = VLNMSPredictor(settings.config("cpu"))
    predictor.model.roi_heads.mask_on = False
    refines = predictor.model.roi_heads.vlnms.relatedness.refines
    for i, image in enumerate(images):
        with one_thread():
            answers = predictor(
                read_image(image["file_name"], "BGR"), [e["query"] for e in captions]
            )
        assert (store.images[i].height, store.images[i].width) == answers[0].image_size
        for j, answer in enumerate(answers):
            found = store.proposals(i, j)
            assert len(found.scores) == len(answer) > 0
            assert (store.index[i, j, len(answer) :] == PairStore.PADDING).all()
            # Candidates are the same to the bit; where their s are nearly equal they may change
            # places, as all captions are scored at once.
            expected = zip(answer.pred_classes.tolist(), answer.cls_scores.tolist(), strict=True)
            place_of = {candidate: place for place, candidate in enumerate(expected)}
            candidates = zip(found.classes.tolist(), found.scores.tolist(), strict=True)
            place = [place_of.pop(candidate) for candidate in candidates]
            assert_rounds_alike(answer.scores[place], answer.scores)
            boxes = answer.pred_boxes.tensor[place].numpy()
            assert refines or np.array_equal(found.boxes, boxes)
            if store.scores is not None:
                expected = answer.scores.numpy().astype(np.float16)
                assert np.allclose(store.scores[i, j, : len(answer)], expected, rtol=2e-3)
    return store


def test_every_pair_is_what_the_predictor_gives(whole):
    check_against_predictor(whole[0])


def test_trans_with_box_refinement(make_settings):
    settings = make_settings("Trans", layer="relatedness")
    run_pairs(settings)
    assert check_against_predictor(settings).scores is None


def test_pools_have_the_features_of_the_layer(make_settings, whole, tmp_path):
    half = make_settings(out=tmp_path / "half", layer="relatedness", dtype="float16")
    run_pairs(half)
    detector, relatedness = PairStore(whole[0].out), PairStore(half.out)
    assert np.array_equal(detector.index, relatedness.index)
    predictor = VLNMSPredictor(half.config("cpu"))
    model, head = predictor.model, predictor.model.roi_heads
    for i, image in enumerate(DatasetCatalog.get(exported.DATASET)):
        pools = detector.pool(i), relatedness.pool(i)
        picture = read_image(image["file_name"], "BGR")
        images = model.preprocess_image([predictor.prepare(picture)])
        scale = np.array(images.image_sizes[0])[::-1] / picture.shape[1::-1]
        boxes = torch.from_numpy(pools[0].boxes * np.array([*scale, *scale])).float()
        with torch.no_grad():
            maps = model.backbone(images.tensor)
            pooled = head.pool_boxes(maps, [Boxes(boxes)])
            expected = head.box_head(pooled), head.vlnms.visual_encoder(pooled)
        assert [p.features.dtype for p in pools] == [np.float32, np.float16]
        for pool, features, atol in zip(pools, expected, (1e-4, 1e-2), strict=True):
            assert np.allclose(pool.features, features.numpy(), atol=atol, rtol=1e-2)


def test_two_processes_give_the_same_bytes(whole, tmp_path):
    settings, files = whole
    settings = dataclasses.replace(settings, out=tmp_path / "two")
    run_pairs(settings, Processes(processes=2))
    assert exported.files_of(settings.out) == files


def test_killed_runs_go_on_with_nothing_lost_or_doubled(whole, tmp_path, root):
    settings, files = whole
    settings = dataclasses.replace(settings, out=tmp_path / "killed")
    # Among the pools, again among them, among the pairs, then in the output.
    kills = [(".work/shards", 2), (".work/shards", 3), (".work/shards", 4), (".", 3)]
    exported.run_with_kills(run_pairs, root, settings, kills)
    assert exported.files_of(settings.out) == files


def test_a_run_that_has_its_pools_does_not_ask_the_detector(whole, tmp_path, monkeypatch):
    settings, files = whole
    settings = dataclasses.replace(settings, out=tmp_path / "out")

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pairs, "choose", stop)
        with pytest.raises(KeyboardInterrupt):
            run_pairs(settings)
    monkeypatch.setattr(pairs, "make_pool", stop)
    run_pairs(settings)
    assert exported.files_of(settings.out) == files


def test_the_tool_writes_pairs_and_chosen_ones_for_scan(whole, make_settings, tmp_path, capsys):
    settings, files = whole
    store = PairStore(settings.out)
    chosen = [(store.images[i].image_id, store.captions[j].caption_id) for i, j in [(4, 0), (0, 9)]]
    (tmp_path / "chosen.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in chosen))
    words = [
        "--config-file", str(settings.model.config_file), "--dataset", exported.DATASET,
        "--out", str(tmp_path / "out"), "--top-n", str(TOP_N), "--scores", "--num-gpus", "0",
        "--scan", str(tmp_path / "chosen.jsonl"), "--scan-out", str(tmp_path / "scan"),
        "--boxes", "3", "--split", "dev",
    ]  # fmt: skip
    assert pairs_tool.main(words) == 0
    assert exported.files_of(tmp_path / "out") == files
    assert "pairs: 50" in capsys.readouterr().out
    rows = np.load(tmp_path / "scan" / "dev_ims.npy")
    assert rows.shape[:2] == (2, 3)
    for row, (i, j) in zip(rows, [(4, 0), (0, 9)], strict=True):
        features = store.proposals(i, j).features[:3]
        assert np.array_equal(row, features[np.arange(3) % len(features)])
    captions = (tmp_path / "scan" / "dev_caps.txt").read_text().splitlines()
    assert captions == [store.captions[j].caption for j in (0, 9)]
    assert pairs_tool.main([*words, "--imram", "--split", "test", "--allow-test-split"]) == 0
    assert np.array_equal(np.load(tmp_path / "scan" / "test_feat.npy"), rows)
    with pytest.raises(SystemExit):
        pairs_tool.main([*words, "--split", "test"])
    assert "boxes of each image's first caption" in capsys.readouterr().err
    assert pairs_tool.main(words) == 0  # again
    capsys.readouterr()
    theirs = [*words, "--overwrite"]
    theirs[words.index(str(tmp_path / "out"))] = str(tmp_path / "not made")
    theirs[words.index(str(tmp_path / "scan"))] = str(tmp_path / "theirs")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "dev_ims.npy").write_text("theirs")
    assert pairs_tool.main(theirs) == 1
    error = capsys.readouterr().err
    assert "dev_ims.npy: this tool did not write it" in error
    assert f"remove dev_ims.npy from {tmp_path / 'theirs'}" in error
    assert not (tmp_path / "not made").exists()
    assert [path.read_text() for path in (tmp_path / "theirs").iterdir()] == ["theirs"]
    words[words.index("3")] = "99"
    assert pairs_tool.main(words) == 1
    assert "99 boxes are asked for, but the store has 5" in capsys.readouterr().err
    words[words.index("99")] = "3"
    (tmp_path / "chosen.jsonl").write_text("[1, 2, 3]\n")
    assert pairs_tool.main(words) == 1
    assert "chosen.jsonl, line 1: expected [image id, caption id]" in capsys.readouterr().err


def test_the_pairs_are_scored_by_any_model(whole, tmp_path):
    settings, _ = whole
    store = PairStore(settings.out)

    def sim(features, captions):
        return features.mean((1, 2))[:, None] + len(captions[0])

    found = score_pairs(settings.out, sim, tmp_path / "scores", images_per_call=2)
    for i, j in np.ndindex(5, 10):
        features = store.proposals(i, j).features
        features = features[np.arange(TOP_N) % len(features)]
        expected = torch.tensor(features.mean() + len(store.captions[j].caption))
        assert_rounds_alike(torch.tensor(found[i, j]), expected)
    results = pair_retrieval(store, found)
    assert (results["images"], results["captions"]) == (5, 10)


def test_several_data_sets_go_into_one_store(whole, tmp_path, capsys):
    settings, _ = whole
    images = DatasetCatalog.get(exported.DATASET)
    parts = {"pairs_train": images[:2], "pairs_restval": images[1:]}
    for name, part in parts.items():
        DatasetCatalog.register(name, lambda part=part: part)
    words = [
        "--config-file", str(settings.model.config_file), "--dataset", *parts,
        "--out", str(tmp_path / "out"), "--top-n", str(TOP_N), "--num-gpus", "0",
    ]  # fmt: skip
    try:
        assert pairs_tool.main(words) == 0
        words.remove("pairs_train")
        assert pairs_tool.main(words) == 1
    finally:
        for name in parts:
            DatasetCatalog.remove(name)
    assert "holds a run of other input or settings" in capsys.readouterr().err
    both, one = PairStore(tmp_path / "out"), PairStore(settings.out)
    assert (both.images, both.captions) == (one.images, one.captions)
    assert np.array_equal(both.index, one.index)


def test_what_is_no_store_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished export of pairs"):
        PairStore(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"top_n": 0}, "top_n is 0"), ({"layer": "p2"}, "features are 'p2'"),
     ({"dtype": "int8"}, "dtype is 'int8'")],
)  # fmt: skip
def test_wrong_settings(make_settings, given, message):
    with pytest.raises(ValueError, match=message):
        make_settings(**given)


def test_more_candidates_than_two_bytes_can_tell(make_settings):
    settings = make_settings()
    model = dataclasses.replace(settings.model, opts=("MODEL.VLNMS.MAX_CANDIDATES", "65535"))
    with pytest.raises(ValueError, match="expected fewer than 65,535"):
        run_pairs(dataclasses.replace(settings, model=model))


@pytest.fixture
def head(make_settings):
    return VLNMSPredictor(make_settings().config("cpu")).model.roi_heads


@torch.no_grad()
def test_condensed_text_is_scored_alike(head):
    text = head.vlnms.text_encoder(["the red cup", "", "dog", "a blue cup left of the dog"])
    visual, locations = torch.randn(30, 32), torch.rand(30, 5)
    plain, _ = head.vlnms.score(visual, locations, text)
    short = head.vlnms.relatedness.condense(text)
    assert short.words.shape[:2] == (4, 1)
    condensed, _ = head.vlnms.score(visual, locations, short)
    assert_rounds_alike(condensed, plain)
    assert (condensed[1] == 1).all() and not torch.allclose(condensed[0], condensed[2])
    parts = [text[:1], text[1:2], text[2:]]
    together, _ = head.vlnms.score(visual, locations, TextFeatures.cat(parts))
    assert_rounds_alike(together, plain)


def test_boxes_without_area_are_left_out_as_detectron2_does(head):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 60, (20, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 30, (20, 2))], 1).astype(np.float32)
    pool = ScoredPool(
        input_boxes=boxes,
        boxes=boxes,
        scores=np.linspace(0.9, 0.1, 20, dtype=np.float32),
        classes=np.arange(20),
        has_area=np.arange(20) % 2 == 0,
        visual=rng.standard_normal((20, 32)).astype(np.float32),
        features=boxes,
        input_size=np.array([96, 128]),
        image_size=np.array([60, 80]),
    )
    text = encode_captions(head, ["cup", "", "dog"])
    found = choose(head, text, pool, TOP_N, with_scores=True)
    pool = dataclasses.replace(pool, has_area=np.full(20, True))
    every = choose(head, text, pool, TOP_N)["index"]
    for own, own_scores, row in zip(found["index"], found["scores"], every, strict=True):
        expected = [i for i in row if i % 2 == 0]
        assert own[: len(expected)].tolist() == expected
        assert (own[len(expected) :] == PairStore.PADDING).all()
        assert (own_scores[len(expected) :] == 0).all()
    # The empty caption leaves the detector's order.
    assert every[1].tolist() == list(range(TOP_N))
