import io

import numpy as np
import pytest
import torch
from closeness import assert_instances_alike
from PIL import Image
from small_models import build, same_instances

from vlnms_d2 import VLNMSPredictor


@pytest.fixture
def predictor(config, tmp_path) -> VLNMSPredictor:
    cfg = config()
    torch.save({"model": build(cfg).state_dict()}, tmp_path / "weights.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    return VLNMSPredictor(cfg)


def picture(height: int = 60, width: int = 80) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_one_instances_per_query_in_pixels_of_the_image(predictor):
    results = predictor(picture(), ["red cup", "", "dog"])
    assert len(results) == 3
    for query_index, instances in enumerate(results):
        assert instances.image_size == (60, 80)
        assert len(instances) > 0
        assert (instances.query_index == query_index).all()
        assert instances.pred_boxes.tensor[:, 2].max() <= 80
        assert instances.pred_masks.shape[1:] == (60, 80)


def test_a_single_string_is_one_query(predictor):
    (alone,) = predictor(picture(), "red cup")
    (listed,) = predictor(picture(), ["red cup"])
    assert same_instances(alone, listed)
    assert predictor(picture(), []) == []


def test_compare_gives_the_detector_beside_the_queries(predictor):
    stock, (asked,) = predictor.compare(picture(), "red cup")
    assert not stock.has("query_index") and asked.has("query_index")
    with torch.no_grad():
        (alone,) = predictor.model([predictor.prepare(picture())])
    assert_instances_alike(stock, alone["instances"])
    (called,) = predictor(picture(), "red cup")
    assert_instances_alike(asked, called)


def test_the_input_format_is_followed(predictor):
    blue = np.zeros((40, 40, 3), np.uint8)
    blue[..., 0] = 255
    assert predictor.prepare(blue)["image"][:, 0, 0].tolist() == [255, 0, 0]
    predictor.input_format = "RGB"
    assert predictor.prepare(blue)["image"][:, 0, 0].tolist() == [0, 0, 255]


def test_an_image_of_one_pixel_is_answered(predictor):
    (instances,) = predictor(np.full((1, 1, 3), 90, np.uint8), "red cup")
    assert instances.image_size == (1, 1)
    assert len(instances) > 0


def test_an_image_of_pillow_is_known_to_be_rgb(predictor):
    bgr = picture()
    rgb = Image.fromarray(bgr[:, :, ::-1].copy())
    [expected] = predictor(bgr, "red cup")
    for image in (rgb, rgb.convert("RGBA")):
        assert same_instances(predictor(image, "red cup")[0], expected)
    stock, _ = predictor.compare(rgb, "red cup")
    assert_instances_alike(stock, predictor.compare(bgr, "red cup")[0])
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned back
    rgb.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    turned = predictor.prepare(Image.open(file))["image"]
    assert torch.equal(turned, predictor.prepare(bgr)["image"])
    gray = Image.fromarray(bgr[:, :, 0])
    stacked = np.repeat(bgr[:, :, :1], 3, axis=2)
    assert torch.equal(predictor.prepare(gray)["image"], predictor.prepare(stacked)["image"])


def test_what_cannot_be_8_bits_or_resized_is_an_error(predictor):
    deep = Image.fromarray(np.full((9, 9), 30_000, np.uint16))
    with pytest.raises(ValueError, match="more than 8 bits"):
        predictor(deep, "red cup")
    with pytest.raises(ValueError, match="the image: 5000x1 pixels is too thin to be resized"):
        predictor(np.zeros((1, 5000, 3), np.uint8), "red cup")


@pytest.mark.parametrize(
    "image",
    [
        None,
        np.zeros((40, 40), np.uint8),
        np.zeros((40, 40, 4), np.uint8),
        np.zeros((0, 40, 3), np.uint8),
        np.zeros((40, 40, 3), np.float32),
        np.zeros((40, 40, 3), np.uint16),
        np.zeros((40, 40, 3), np.int32),
    ],
)
def test_what_is_not_an_image_is_an_error(predictor, image):
    with pytest.raises(ValueError, match=r"must be a uint8 array \[H, W, 3\]"):
        predictor(image, "red cup")


def test_a_query_that_is_not_a_string_is_an_error(predictor):
    with pytest.raises(TypeError, match=r"query\[1\] must be a string, got int"):
        predictor(picture(), ["red cup", 3])
