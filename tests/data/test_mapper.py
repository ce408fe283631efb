"""From a dataset dict with expressions to a model input."""

import copy

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from vlnms_d2 import add_vlnms_config
from vlnms_d2.data import GroundingMapper
from vlnms_d2.data.mapper import read_image

WIDTH, HEIGHT = 40, 30
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def image(tmp_path):
    """An image of which the left half is red and the right half blue."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, : WIDTH // 2], pixels[:, WIDTH // 2 :] = RED, BLUE
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def annotation(ann_id: int, *bbox, mode=BoxMode.XYWH_ABS) -> dict:
    return {"id": ann_id, "bbox": list(bbox), "bbox_mode": mode, "category_id": 10 + ann_id}


def expression(sent_id: int, ann_id: int, context=()) -> dict:
    return {
        "sent_id": sent_id,
        "ref_id": 100 + sent_id,
        "query": f"query {sent_id}",
        "ann_id": ann_id,
        "context_ann_ids": None if context is None else list(context),
        "split": "train",
        "manner": "refcoco",
    }


def dataset_dict(file_name: str, *expressions: dict, annotations=None) -> dict:
    return {
        "file_name": file_name,
        "image_id": 7,
        "height": HEIGHT,
        "width": WIDTH,
        # Whole numbers, as COCO and RefShapes have many.
        "annotations": annotations
        or [
            annotation(1, 3, 5, 4, 6),
            annotation(2, 11, 1, 20, 8, mode=int(BoxMode.XYXY_ABS)),
            annotation(3, 0.5, 0.25, 10, 20.5),
        ],
        "expressions": list(expressions),
    }


def make_mapper(is_train=True, shortest=45, max_queries=32, **options) -> GroundingMapper:
    return GroundingMapper(
        is_train=is_train,
        augmentations=[T.ResizeShortestEdge(shortest, 1000)],
        image_format="BGR",
        max_queries=max_queries,
        **options,
    )


def test_the_image_is_resized_and_the_original_size_kept(image):
    found = make_mapper()(dataset_dict(image, expression(1, 1)))
    assert found["image"].shape == (3, 45, 60) and found["image"].dtype == torch.uint8
    assert (found["height"], found["width"], found["image_id"]) == (HEIGHT, WIDTH, 7)
    assert found["file_name"] == image
    assert "annotations" not in found


def test_foreground_boxes_are_xyxy_scaled_with_the_image_referent_first(image):
    found = make_mapper()(
        dataset_dict(image, expression(1, 1, [3, 2]), expression(2, 3), expression(3, 2, None))
    )
    # Both sides times 1.5; halves of whole numbers are not cut off.
    boxes = {1: [4.5, 7.5, 10.5, 16.5], 2: [16.5, 1.5, 30, 12], 3: [0.75, 0.375, 15.75, 31.125]}
    targets = found["query_targets"]
    assert [t.image_size for t in targets] == [(45, 60)] * 3
    assert all(t.gt_boxes.tensor.dtype == torch.float32 for t in targets)
    assert [t.gt_boxes.tensor.tolist() for t in targets] == [
        [boxes[1], boxes[3], boxes[2]],
        [boxes[3]],
        [boxes[2]],
    ]
    assert [t.gt_classes.tolist() for t in targets] == [[11, 13, 12], [13], [12]]


def test_each_side_has_its_own_scale(image):
    mapper = make_mapper()
    mapper.augmentations = T.AugmentationList([T.Resize((60, 20))])
    (target,) = mapper(dataset_dict(image, expression(1, 1)))["query_targets"]
    assert target.image_size == (60, 20)
    assert target.gt_boxes.tensor.tolist() == [[1.5, 10, 3.5, 22]]


def test_targets_lie_within_the_image(image):
    annotations = [annotation(1, -5, 10, 100, 100)]
    found = make_mapper()(dataset_dict(image, expression(1, 1), annotations=annotations))
    assert found["query_targets"][0].gt_boxes.tensor.tolist() == [[0, 15, 60, 45]]


@pytest.mark.parametrize("is_train", [True, False])
def test_expressions_are_described_in_pixels_of_the_file(image, is_train):
    expressions = [expression(4, 3, [1]), expression(5, 2), expression(6, 1, None)]
    found = make_mapper(is_train)(dataset_dict(image, *expressions))
    assert found["query"] == ["query 4", "query 5", "query 6"]
    assert found["expressions"] == [
        {
            "sent_id": 4,
            "manner": "refcoco",
            "referent_box": [0.5, 0.25, 10.5, 20.75],
            "context_boxes": [[3, 5, 7, 11]],
        },
        {
            "sent_id": 5,
            "manner": "refcoco",
            "referent_box": [11, 1, 20, 8],
            "context_boxes": [],
        },
        {
            "sent_id": 6,
            "manner": "refcoco",
            "referent_box": [3, 5, 7, 11],
            "context_boxes": None,
        },
    ]
    assert ("query_targets" in found) == is_train


def with_masks(annotations: list[dict]) -> list[dict]:
    """With a triangle in each box."""
    for each in annotations:
        x, y, width, height = BoxMode.convert(each["bbox"], each["bbox_mode"], BoxMode.XYWH_ABS)
        each["segmentation"] = [[x, y, x + width, y, x, y + height]]
    return annotations


@pytest.mark.parametrize("kind", ["boxes", "polygon", "bitmask"])
def test_ground_truth_of_the_detector_is_that_of_detectron2s_mapper(image, kind):
    given = dataset_dict(image, expression(1, 1))
    with_masks(given["annotations"])
    given["annotations"].append(annotation(4, 1, 1, 9, 9) | {"iscrowd": 1, "segmentation": []})
    found = make_mapper(instances=kind)(copy.deepcopy(given))["instances"]
    stock = DatasetMapper(
        is_train=True,
        augmentations=[T.ResizeShortestEdge(45, 1000)],
        image_format="BGR",
        use_instance_mask=kind != "boxes",
        instance_mask_format="polygon" if kind == "boxes" else kind,
    )(copy.deepcopy(given))["instances"]
    assert len(found) == 3 and found.get_fields().keys() == stock.get_fields().keys()
    assert torch.equal(found.gt_boxes.tensor, stock.gt_boxes.tensor)
    assert torch.equal(found.gt_classes, stock.gt_classes)
    if kind != "boxes":
        boxes = [each.gt_masks.get_bounding_boxes().tensor for each in (found, stock)]
        assert torch.equal(*boxes) and boxes[0].any()


def test_ground_truth_of_the_detector_only_where_it_learns(image):
    given = dataset_dict(image, expression(1, 1))
    assert "instances" not in make_mapper()(given)
    assert "instances" not in make_mapper(is_train=False, instances="boxes")(given)
    with pytest.raises(ValueError, match=r"image\.png has objects without .*MASK_ON to False"):
        make_mapper(instances="polygon")(given)
    given["annotations"][1]["category_id"] = -1
    with pytest.raises(ValueError, match=r"image\.png has objects without .*FREEZE_DETECTOR to Tr"):
        make_mapper(instances="boxes")(given)


def test_an_expression_without_a_referent_has_its_contextual_objects_for_foreground(image):
    expressions = [expression(1, None, [3, 2]), expression(2, None, [])]
    for with_context in (True, False):  # False leaves out what is beside a referent
        found = make_mapper(with_context=with_context)(dataset_dict(image, *expressions))
        first, second = found["query_targets"]
        assert first.gt_boxes.tensor.tolist() == [[0.75, 0.375, 15.75, 31.125], [16.5, 1.5, 30, 12]]
        assert first.gt_classes.tolist() == [13, 12]
        assert (
            second.gt_boxes.tensor.shape == (0, 4) and second.gt_boxes.tensor.dtype == torch.float
        )
        assert second.gt_classes.shape == (0,) and second.gt_classes.dtype == torch.int64
        assert [e["referent_box"] for e in found["expressions"]] == [None, None]
        assert [e["context_boxes"] for e in found["expressions"]] == [
            [[0.5, 0.25, 10.5, 20.75], [11, 1, 20, 8]],
            [],
        ]


def test_an_unknown_class_is_passed_on(image):
    unknown = [annotation(1, 3, 5, 4, 6) | {"category_id": -1}]
    found = make_mapper()(dataset_dict(image, expression(1, 1), annotations=unknown))
    assert found["query_targets"][0].gt_classes.tolist() == [-1]


def test_an_expression_of_which_nothing_is_annotated(image):
    given = dataset_dict(image, expression(5, None, None))
    described = make_mapper(is_train=False)(given)["expressions"]
    assert [(e["referent_box"], e["context_boxes"]) for e in described] == [(None, None)]
    with pytest.raises(ValueError, match=f"expression 5 of {image} has neither a referent nor"):
        make_mapper()(given)


def test_a_data_set_that_does_not_know_the_sizes_of_its_images(image):
    given = dataset_dict(image, expression(1, 1))
    del given["height"], given["width"]
    found = make_mapper(is_train=False)(given)
    assert (found["height"], found["width"]) == (HEIGHT, WIDTH)
    assert "height" not in given


def test_the_dataset_dict_is_left_as_it_was(image):
    given = dataset_dict(image, expression(1, 1, [2]))
    before = copy.deepcopy(given)
    make_mapper()(given)
    assert given == before


def config():
    cfg = get_cfg()
    add_vlnms_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (30, 60), 70
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 90, 1000
    cfg.MODEL.VLNMS.MAX_QUERIES_PER_IMAGE = 2
    return cfg


def test_the_config_gives_sizes_and_number_of_queries(image):
    expressions = [expression(i, 1) for i in range(4)]
    train, test = GroundingMapper(config(), is_train=True), GroundingMapper(config(), False)
    sizes = set()
    for seed in range(20):
        np.random.seed(seed)
        found = train(dataset_dict(image, *expressions))
        assert len(found["query"]) == len(found["query_targets"]) == 2
        sizes.add(tuple(found["image"].shape[1:]))
    assert sizes == {(30, 40), (53, 70)}  # the longer side of 60 x 80 is above 70
    found = test(dataset_dict(image, *expressions))
    assert found["image"].shape == (3, 90, 120) and len(found["query"]) == 4


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_images_are_never_flipped_whatever_detectron2s_key_says(image, image_format):
    cfg = config()
    cfg.INPUT.FORMAT, cfg.INPUT.RANDOM_FLIP = image_format, "horizontal"
    mapper = GroundingMapper(cfg, is_train=True)
    red = {"BGR": RED[::-1], "RGB": RED}[image_format]
    for seed in range(20):
        np.random.seed(seed)
        found = mapper(dataset_dict(image, expression(1, 1)))
        assert tuple(found["image"][:, 0, 0].tolist()) == red
        assert tuple(found["image"][:, -1, -1].tolist()) == red[::-1]


# --- drawing expressions -----------------------------------------------------------------------


def drawn(mapper, image: str, seed: int, number: int = 9) -> list[int]:
    np.random.seed(seed)
    expressions = [expression(i, 1 + i % 3) for i in range(number)]
    found = mapper(dataset_dict(image, *expressions))
    ids = [e["sent_id"] for e in found["expressions"]]
    assert found["query"] == [f"query {i}" for i in ids]
    if mapper.is_train:
        firsts = [t.gt_boxes.tensor[0, 0].item() for t in found["query_targets"]]
        assert firsts == [[4.5, 16.5, 0.75][i % 3] for i in ids]
    return ids


def test_at_most_max_queries_are_drawn_in_order_and_reproducibly(image):
    mapper = make_mapper(max_queries=4)
    draws = [drawn(mapper, image, seed) for seed in range(30)]
    assert all(len(set(ids)) == 4 and ids == sorted(ids) for ids in draws)
    assert draws == [drawn(mapper, image, seed) for seed in range(30)]
    assert set().union(*draws) == set(range(9))
    assert len({tuple(ids) for ids in draws}) > 20


def test_as_many_as_max_queries_are_all_taken(image):
    assert drawn(make_mapper(max_queries=4), image, 0, number=4) == [0, 1, 2, 3]


def test_evaluation_takes_every_expression_and_draws_nothing(image):
    mapper = make_mapper(is_train=False, max_queries=2)
    assert drawn(mapper, image, 3) == list(range(9))
    state = np.random.get_state()[1].copy()
    mapper(dataset_dict(image, expression(1, 1)))
    assert (np.random.get_state()[1] == state).all()


def test_an_image_without_expressions_has_no_queries(image):
    found = make_mapper()(dataset_dict(image))
    assert found["query"] == found["expressions"] == found["query_targets"] == []


# --- odd images and errors ---------------------------------------------------------------------


def test_an_image_of_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "dot.png")
    given = dataset_dict(
        str(tmp_path / "dot.png"), expression(1, 1), annotations=[annotation(1, 0, 0, 1, 1)]
    )
    found = make_mapper()({**given, "height": 1, "width": 1})
    assert found["image"].shape == (3, 45, 45)
    assert found["query_targets"][0].gt_boxes.tensor.tolist() == [[0, 0, 45, 45]]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_kinds_of_images_become_three_channels(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    file_name = str(tmp_path / f"image.{suffix}")
    gray = Image.new("RGB", (WIDTH, HEIGHT), (90, 90, 90))
    (gray.quantize(2) if mode == "P" else gray.convert(mode)).save(file_name)
    with Image.open(file_name) as saved:
        assert saved.mode == mode
    found = make_mapper()(dataset_dict(file_name, expression(1, 1)))
    assert found["image"].shape == (3, 45, 60)
    assert (found["image"].float() - 90).abs().max() <= 3


@pytest.mark.parametrize("bad", ["ann_id", "context_ann_ids"])
def test_a_missing_annotation_is_an_error_that_names_it(image, bad):
    one = expression(5, 1, [2])
    one[bad] = 99 if bad == "ann_id" else [2, 99]
    with pytest.raises(KeyError, match=r"expression 5 .* annotation 99") as error:
        make_mapper()(dataset_dict(image, one))
    assert image in str(error.value)


def test_a_missing_image_is_named(tmp_path):
    path = str(tmp_path / "no.jpg")
    with pytest.raises(FileNotFoundError, match=f"no image file {path}"):
        make_mapper()(dataset_dict(path, expression(1, 1)))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_an_image_that_is_cut_off_is_named(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{path} cannot be read as an image"):
        make_mapper()(dataset_dict(str(path), expression(1, 1)))


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\xff\xd8\xff\xe0"])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} cannot be read as an image"):
        read_image(str(path), "BGR")


def test_a_file_that_claims_an_absurd_size_is_named(image, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=f"{image} cannot be read as an image"):
        read_image(image, "BGR")


def test_an_image_is_turned_as_exif_says(tmp_path):
    upright = Image.new("RGB", (HEIGHT, WIDTH), RED)
    exif = upright.getexif()
    exif[0x0112] = 6  # turned by a quarter
    upright.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg", "BGR").shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(
    ("dtype", "suffix"),
    [("uint16", "png"), ("uint16", "tif"), ("int32", "tif"), ("float32", "tif")],
)
def test_pixels_of_more_than_8_bits_are_named(tmp_path, dtype, suffix):
    """Pillow makes them white or black."""
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(np.full((4, 5), 30_000, dtype)).save(path)
    with pytest.raises(ValueError, match=rf"{path} .*\(its pixels have more than 8 bits"):
        read_image(path, "BGR")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_all_other_modes_are_read_as_before(tmp_path, mode):
    image = Image.new("RGB", (5, 4), RED).convert(mode)
    path = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.png")
    image.save(path)
    for image_format in ("BGR", "RGB"):
        stock = detection_utils.read_image(str(path), image_format)
        assert np.array_equal(read_image(path, image_format), stock)


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000)])
def test_an_image_too_thin_to_be_resized_is_named(tmp_path, size):
    path = tmp_path / "thin.png"
    Image.new("RGB", size).save(path)
    one = dataset_dict(str(path), expression(1, 1)) | {"width": size[0], "height": size[1]}
    with pytest.raises(ValueError, match=f"{path}: {size[0]}x{size[1]} pixels is too thin"):
        make_mapper()(one)


@pytest.mark.parametrize("key", ["width", "height"])
def test_an_image_of_another_size_than_annotated_is_named(image, key):
    given = dataset_dict(image, expression(1, 1))
    given[key] += 1
    with pytest.raises(ValueError, match=image):
        make_mapper()(given)
