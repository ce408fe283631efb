"""Boxes with features and masks of chosen boxes, against the model's own answers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from closeness import assert_rounds_alike
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from pretend_cuda import CudaTensor, PretendCuda, on_cuda
from small_models import build

from second_stages.evaluation import (
    answers,
    evaluate_masks,
    masks_of_boxes,
    read_choices,
    write_choices,
)
from second_stages.extraction import RegionExtractor
from second_stages.rec_training import Choice
from vlnms_d2.data import GroundingMapper
from vlnms_d2.modeling.postprocessing import split_by_query

QUERIES = ["the red cup", "left of the dog", "dog"]


@pytest.fixture
def made(config, tmp_path, monkeypatch):
    """`made(name=relatedness)`: an extractor of small models that share a detector, and these."""

    def make(**relatedness: str) -> RegionExtractor:
        configs = {}
        for name, kind in relatedness.items():
            cfg = config("VLNMSHead", kind)
            model = build(cfg)
            path = tmp_path / f"{name}.pth"
            torch.save({"model": model.state_dict()}, path)
            cfg.MODEL.WEIGHTS = str(path)
            configs[name] = cfg
        return RegionExtractor(configs)

    return make


@pytest.fixture
def image(tiny_refshapes) -> dict:
    return DatasetCatalog.get(f"{tiny_refshapes}_val")[0]


@torch.no_grad()
def model_output(model, extractor, image, **fields):
    image_input = extractor.mapper({**image, "annotations": [], "expressions": []})
    del image_input["query"], image_input["expressions"]
    return model([{**image_input, **fields}])[0]["instances"]


def filled(boxes, index):
    """Those of the boxes at `index` that have an area."""
    return index[(boxes[index, 2:] > boxes[index, :2]).all(dim=1)]


@pytest.mark.parametrize("relatedness", ["FC", "Trans"])
def test_the_boxes_are_the_models(made, image, relatedness):
    extractor = made(one=relatedness)
    model = extractor.models["one"]
    features = extractor.run_detector(image)
    stock = model_output(model, extractor, image)
    found = extractor.detected(features, image["image_id"])
    # The model's postprocessing leaves out empty boxes, of which a random detector has some.
    index = filled(found.boxes, torch.arange(len(found)))
    assert_rounds_alike(found.boxes[index], stock.pred_boxes.tensor)
    assert_rounds_alike(found.scores[index], stock.scores)
    assert torch.equal(found.classes[index], stock.pred_classes)

    own = extractor.query_aware(features, image["image_id"], "one", QUERIES, [5, 6, 7])
    assert own.sent_ids.tolist() == [5, 6, 7]
    asked = model_output(model, extractor, image, query=QUERIES)
    for row, scores, expected in zip(
        own.kept, own.kept_scores, split_by_query(asked, 3), strict=True
    ):
        index = filled(own.boxes, row[row >= 0])
        assert len(index) == len(expected)
        expected_boxes = expected.pred_boxes.tensor
        assert_rounds_alike(own.boxes[index], expected_boxes)
        at = [row.tolist().index(i) for i in index.tolist()]
        assert_rounds_alike(scores[at], expected.scores)
        assert torch.equal(own.classes[index], expected.pred_classes)
        assert_rounds_alike(own.scores[index], expected.cls_scores)


@torch.no_grad()
def test_features_are_those_of_the_box_wherever_it_comes_from(made, image):
    extractor = made(one="FC")
    features = extractor.run_detector(image)
    annotated = extractor.annotated(features, image)
    assert annotated.ids.tolist() == [a["id"] for a in image["annotations"]]
    assert annotated.size == (image["height"], image["width"])
    head = extractor.model.roi_heads
    (height, width), (output_height, output_width) = features.image_size, features.output_size
    scale = torch.tensor([width / output_width, height / output_height] * 2)
    scaled = annotated.boxes * scale
    for n in range(3):
        pooled = head.box_pooler(
            [features.maps[f] for f in head.box_in_features], [Boxes(scaled[n : n + 1])]
        )
        cells = pooled[0].flatten(1)
        deviation = cells.std(dim=1, correction=0)
        expected = torch.cat([head.box_head(pooled)[0], cells.mean(1), deviation])
        torch.testing.assert_close(annotated.features[n].float(), expected, rtol=1e-2, atol=1e-3)


def moved(value):
    """The same on the pretend GPU."""
    if isinstance(value, torch.Tensor):
        return CudaTensor(value)
    if isinstance(value, Boxes):
        return Boxes(moved(value.tensor))
    if isinstance(value, Instances):
        fields = {name: moved(field) for name, field in value.get_fields().items()}
        return Instances(value.image_size, **fields)
    if isinstance(value, dict):
        return {name: moved(one) for name, one in value.items()}
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{n: moved(getattr(value, n)) for n in names})
    return value


@pytest.mark.parametrize("relatedness", ["FC", "Trans"])
def test_what_a_gpu_computes_is_stored_on_the_cpu(made, image, relatedness):
    def extracted(features):
        image_id = image["image_id"]
        return [
            extractor.annotated(features, image),
            extractor.detected(features, image_id),
            extractor.query_aware(features, image_id, "one", QUERIES, [5, 6, 7]),
        ]

    extractor = made(one=relatedness)
    features = extractor.run_detector(image)
    expected = extracted(features)
    extractor.model = on_cuda(extractor.model)
    extractor.models, extractor._encoded = {"one": extractor.model}, {}
    extractor.encoder = extractor.model.roi_heads.get_submodule(
        extractor.model.roi_heads.visual_encoder_source
    )
    with PretendCuda():
        found = extracted(moved(features))
    for ours, cpus in zip(found, expected, strict=True):
        for name, value in vars(cpus).items():
            if isinstance(value, torch.Tensor):
                assert type(getattr(ours, name)) is torch.Tensor, name
                torch.testing.assert_close(getattr(ours, name), value, rtol=1e-3, atol=1e-3)
            else:
                assert getattr(ours, name) == value


def test_an_image_without_annotations(made, image):
    extractor = made(one="FC")
    found = extractor.annotated(extractor.run_detector(image), {**image, "annotations": []})
    assert found.boxes.shape == (0, 4)
    assert found.features.shape[0] == 0


def test_models_on_different_detectors_are_refused(config, made, tmp_path):
    made(one="FC")
    cfgs = {}
    for name, seed in (("one", 0), ("two", 1)):
        cfgs[name] = config("VLNMSHead", "FC")
        path = tmp_path / f"{name}.pth"
        torch.save({"model": build(cfgs[name], seed).state_dict()}, path)
        cfgs[name].MODEL.WEIGHTS = str(path)
    with pytest.raises(ValueError, match="two has another detector than one"):
        RegionExtractor(cfgs)


def test_masks_are_those_that_the_model_gives_its_own_boxes(made, image):
    extractor = made(one="FC")
    stock = model_output(extractor.model, extractor, image)
    assert len(stock) > 3
    image_input = extractor.mapper(image)
    boxes = torch.cat([stock.pred_boxes.tensor, torch.zeros(1, 4)])
    classes = torch.cat([stock.pred_classes, torch.zeros(1, dtype=torch.int64)])
    masks = masks_of_boxes(extractor.model, image_input, boxes, classes)
    differing = (masks[:-1] != stock.pred_masks).float().mean()
    assert float(differing) < 1e-3  # boxes went to the image's pixels and back
    assert not masks[-1].any()


def test_res_of_runs_that_chose_the_same_and_other_boxes(made, image, tmp_path):
    extractor = made(one="FC")
    regions = extractor.annotated(extractor.run_detector(image), image)
    regions.classes %= 5  # the small model has no more
    place = {ann_id: n for n, ann_id in enumerate(regions.ids.tolist())}
    images, right = {image["image_id"]: regions}, []
    for expression in image["expressions"]:
        right.append(Choice(place[expression["ann_id"]], 1.0))
    wrong = [Choice((choice.box + 1) % len(regions), 1.0) for choice in right]
    choices = {}
    for name, chosen in (("right", right), ("wrong", wrong), ("again", right)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "choices_tiny.json"
        write_choices(path, {image["image_id"]: chosen}, images)
        choices[tmp_path / name] = read_choices(path)
        boxes = [row[:4] for row in choices[tmp_path / name][image["image_id"]]]
        instances = answers({image["image_id"]: chosen}, images)[image["image_id"]]
        torch.testing.assert_close(torch.tensor(boxes), instances.pred_boxes.tensor)
    mapper = GroundingMapper(is_train=False, augmentations=[], image_format="BGR", max_queries=1)
    evaluate_masks(extractor.model, mapper, "tiny", [image], choices)
    written = [(tmp_path / name / "res_tiny.json").read_text() for name in ("right", "again")]
    assert written[0] == written[1]
    assert written[0] != (tmp_path / "wrong" / "res_tiny.json").read_text()
    with pytest.raises(FileNotFoundError, match="train_second_stage"):
        read_choices(tmp_path / "choices_tiny.json")
    (tmp_path / "choices_tiny.json").write_text("[]")
    with pytest.raises(ValueError, match="is no file of choices"):
        read_choices(tmp_path / "choices_tiny.json")
