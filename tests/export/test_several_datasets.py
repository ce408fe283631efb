"""Exports of RefShapes with the trained model: category ids are those of its annotations;
several data sets go into one output."""

import json
import logging
import os
import pickle
from pathlib import Path

import pytest
from conftest import REPO
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vlnms_d2 import VLNMSPredictor
from vlnms_d2.config import load_config
from vlnms_d2.data.mapper import read_image
from vlnms_d2.export.from_model import ExportSettings, run_export
from vlnms_d2.export.model import ModelSettings, detector_classes

CONFIG = REPO / "configs" / "refshapes" / "vlnms_fc_trained.yaml"
SPLITS = ("val", "testA", "testB")


def export(out, formats, *datasets, **given):
    """Export with the trained model; returns the manifest."""
    model = ModelSettings(CONFIG, datasets[0], more_datasets=datasets[1:])
    return run_export(ExportSettings(model, out, formats, **given))


def read(path):
    return json.loads(path.read_bytes())


def by_sentence(entries, *keys):
    found = {}
    for entry in entries:
        found.setdefault(entry["sent_id"], []).append([entry[key] for key in keys])
    return found


@pytest.fixture(scope="module")
def three(tiny_refshapes, tmp_path_factory):
    """Folder and manifest of an export of three splits."""
    out = tmp_path_factory.mktemp("three") / "out"
    names = [f"{tiny_refshapes}_{split}" for split in SPLITS]
    formats = ("per-expression", "mattnet")
    name = ("att_vanilla", "0", "refshapes", "unc")
    return out, export(out, formats, *names, mean_proposals=3, matt_dets=name, block_size=3)


def test_the_forks_find_every_detection_at_its_own_sentence(three):
    out, _ = three
    sentences = {}
    for style in ("refcoco", "refcoco+", "refcocog"):
        refs = Path(os.environ["TINY_REFSHAPES"]) / f"refs({style}).p"
        for ref in pickle.loads(refs.read_bytes()):
            for sentence in ref["sentences"]:
                sentences[sentence["sent_id"]] = ref
    detections = read(out / "matt_dets_att_vanilla_0_refshapes_unc_0.json")
    # The forks' loaders keep a dictionary by det_id, and take features by h5_id.
    by_id = {det["det_id"]: det for det in detections}
    assert len(by_id) == len(detections) == len({det["h5_id"] for det in detections})
    for det_id, det in by_id.items():
        ref = sentences[det["sent_id"]]
        assert det["h5_id"] == det_id
        for key in ("ref_id", "image_id", "split"):
            assert det[key] == ref[key]
    wanted = {sent_id for sent_id, ref in sentences.items() if ref["split"] in SPLITS}
    assert {det["sent_id"] for det in detections} == wanted
    assert {det["split"] for det in detections} == set(SPLITS)


def test_the_threshold_is_that_of_the_first(three, tmp_path):
    out, manifest = three
    whole = read(out / manifest["published"][0])
    keys = ("box", "category_id", "split", "image_id")
    first = export(tmp_path / "val", ("per-expression",), "tiny_val", mean_proposals=3)
    assert manifest["threshold"] == first["threshold"]
    parts = read(tmp_path / "val" / "per_expression_dets.json")
    for split in SPLITS[1:]:
        given = {"score_thresh": manifest["threshold"]}
        export(tmp_path / split, ("per-expression",), f"tiny_{split}", **given)
        parts += read(tmp_path / split / "per_expression_dets.json")
    assert by_sentence(whole, *keys) == by_sentence(parts, *keys)


def test_category_ids_are_those_of_the_annotations(three):
    out, manifest = three
    annotations = read(Path(os.environ["TINY_REFSHAPES"]) / "instances.json")
    id_of = {category["name"]: category["id"] for category in annotations["categories"]}
    for name in manifest["published"][:2]:
        entries = read(out / name)
        assert entries
        for entry in entries:
            assert entry["category_id"] == id_of[entry["category_name"]]


def test_coco_has_the_average_precision_of_coco_evaluator(tiny_refshapes, tmp_path):
    images = DatasetCatalog.get(f"{tiny_refshapes}_train")
    images = [image | {"expressions": image["expressions"][:1]} for image in images]
    DatasetCatalog.register("one_query_train", lambda: images)
    try:
        export(tmp_path / "out", ("coco",), "one_query_train")
    finally:
        DatasetCatalog.remove("one_query_train")
    evaluator = COCOEvaluator(f"{tiny_refshapes}_instances_train", ("bbox",), output_dir=None)
    evaluator.reset()
    predictor = VLNMSPredictor(ModelSettings(CONFIG, "").config("cpu"))
    for image in images:
        picture = read_image(image["file_name"], "BGR")
        [instances] = predictor(picture, [image["expressions"][0]["query"]])
        evaluator.process([image], [{"instances": instances}])
    expected = evaluator.evaluate()["bbox"]["AP"] / 100
    annotations = Path(os.environ["TINY_REFSHAPES"]) / "annotations" / "instances_train.json"
    truth = COCO(str(annotations))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "out" / "results.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert expected > 0.02
    assert evaluation.stats[0] == pytest.approx(expected, abs=0.001)


def test_ids_of_data_sets_with_names_only(tiny_refshapes, tmp_path, caplog):
    cfg = load_config(CONFIG)
    names = MetadataCatalog.get(f"{tiny_refshapes}_val").thing_classes
    own = MetadataCatalog.get("names_only_val")
    own.set(thing_classes=names)
    try:
        with caplog.at_level(logging.WARNING):
            assert detector_classes(cfg, "names_only_val") == (list(range(16)), names)
        assert "names_only_val has names of classes but no category ids" in caplog.text
        categories = [{"id": 70 - 3 * i, "name": name} for i, name in enumerate(names)]
        path = tmp_path / "instances.json"
        path.write_text(json.dumps({"categories": categories}))
        own.set(json_file=str(path))
        assert detector_classes(cfg, "names_only_val") == ([70 - 3 * i for i in range(16)], names)
        path.write_text(json.dumps({"categories": categories[1:]}))
        with pytest.raises(ValueError, match=r"instances\.json: no category is called 'ball'"):
            detector_classes(cfg, "names_only_val")
        own.set(evaluator_type="lvis")
        assert detector_classes(cfg, "names_only_val")[0] == list(range(1, 17))
    finally:
        MetadataCatalog.remove("names_only_val")


def test_an_image_of_two_data_sets_appears_once():
    def expression(sent_id, split):
        return {"sent_id": sent_id, "ref_id": 1, "query": f"cup {sent_id}", "split": split}

    def image(image_id, *expressions):
        return {
            "image_id": image_id,
            "file_name": f"{image_id}.jpg",
            "annotations": [],
            "expressions": expressions,
        }

    both = expression(2, "testAB")
    data = {
        "shared_A": [image(5, expression(1, "testA"), both)],
        "shared_B": [image(3, expression(4, "testB")), image(5, both, expression(3, "testB"))],
        "other": [image(5, expression(1, "elsewhere"))],
    }
    for name, images in data.items():
        images = [one | {"expressions": list(one["expressions"])} for one in images]
        DatasetCatalog.register(name, lambda images=images: images)
    try:
        images = ModelSettings(CONFIG, "shared_A", more_datasets=("shared_B",)).images()
        found = {one["image_id"]: [e["sent_id"] for e in one["expressions"]] for one in images}
        assert found == {3: [4], 5: [1, 2, 3]}
        assert {one["image_id"]: one["num_of_first"] for one in images} == {3: 0, 5: 2}
        with pytest.raises(ValueError, match=r"shared_A \+ other has 2 expressions of the id 1"):
            ModelSettings(CONFIG, "shared_A", more_datasets=("other",)).images()
    finally:
        for name in data:
            DatasetCatalog.remove(name)


def test_an_image_that_a_data_set_lists_twice_is_one_key_of_albef(tiny_refshapes, tmp_path):
    images = DatasetCatalog.get(f"{tiny_refshapes}_val")
    halves = [
        image | {"expressions": part}
        for image in images
        for part in (image["expressions"][:1], image["expressions"][1:])
    ]
    assert all(image["expressions"] for image in halves)
    DatasetCatalog.register("halves_val", lambda: halves)
    try:
        export(tmp_path / "halves", ("albef", "mattnet"), "halves_val", top_n=5)
    finally:
        DatasetCatalog.remove("halves_val")
    export(tmp_path / "whole", ("albef", "mattnet"), "tiny_val", top_n=5)
    pairs = json.loads((tmp_path / "halves/dets.json").read_bytes(), object_pairs_hook=list)
    assert len({key for key, _ in pairs}) == len(pairs) == len(images)
    for name in ("dets.json", "mattnet_dets.json"):
        halves_bytes = (tmp_path / "halves" / name).read_bytes()
        assert halves_bytes == (tmp_path / "whole" / name).read_bytes()


def test_the_name_of_the_forks_needs_their_format(tmp_path):
    with pytest.raises(ValueError, match="matt_dets names the file of per-expression"):
        ExportSettings(ModelSettings(CONFIG, "x"), tmp_path, matt_dets=("a", "0", "b", "unc"))
    with pytest.raises(ValueError, match="expected parts of a file name"):
        ExportSettings(
            ModelSettings(CONFIG, "x"), tmp_path, ("per-expression",), matt_dets=("a/", "0", "", "")
        )
