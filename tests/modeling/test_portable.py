"""Portable: its cues against loops, and in rerank and the heads."""

import math

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from small_models import build, image_input

import vlnms_d2
from vlnms_d2 import split_by_query
from vlnms_d2.language.phrases import AXES, COLOURS, CUES, PARTS, PLACES, RELATIONS
from vlnms_d2.modeling.candidates import Candidates
from vlnms_d2.modeling.relatedness import (
    Portable,
    PortablePhrases,
    category_relatedness,
    portable,
)
from vlnms_d2.modeling.relatedness.portable import NUM_COLOURS, Objects, box_colours, colour_masks
from vlnms_d2.modeling.text import TextFeatures

NAMES = ("person", "dog", "bus")
C = len(NAMES)


def locations(num: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num, 2, generator=generator) * 0.7
    size = torch.rand(num, 2, generator=generator) * 0.28 + 0.02
    boxes = torch.cat([corner, corner + size], dim=1)
    return torch.cat([boxes, size.prod(dim=1, keepdim=True)], dim=1)


def visual(num: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, C, (num,), generator=generator)
    rest = torch.rand(num, 1 + NUM_COLOURS, generator=generator)
    return torch.cat([torch.eye(C)[classes], rest], dim=1)


def phrases(*queries: list[dict]) -> TextFeatures:
    """Queries of phrases: {"classes": weights of the classes, cue: value}."""
    longest = max((len(query) for query in queries), default=0)
    words = torch.zeros(len(queries), longest, C + len(CUES))
    mask = torch.zeros(len(queries), longest, dtype=torch.bool)
    for q, query in enumerate(queries):
        for i, phrase in enumerate(query):
            mask[q, i] = True
            words[q, i, :C] = torch.tensor(phrase.get("classes", [1.0] * C))
            for cue, value in phrase.items():
                if cue != "classes":
                    words[q, i, C + CUES.index(cue)] = value
    return TextFeatures(words, mask)


def module() -> Portable:
    return Portable(visual_dim=C, text_dim=C + len(CUES))


# --- ranks and places ----------------------------------------------------------------------------


def plain_better(objects: Objects, axis: str, j: int, i: int) -> float:
    """How much object j is better than i."""
    if i == j:
        return 0.0
    x1, y1, x2, y2 = objects.boxes.T.tolist()

    def value(k: int) -> float:
        width, height = x2[k] - x1[k], y2[k] - y1[k]
        size = math.sqrt(width * height)
        near = (y2[k] + size) / 2
        shape = math.log(width / height) / 4
        return {
            "left": -(x1[k] + x2[k]) / 2, "right": (x1[k] + x2[k]) / 2,
            "top": -(y1[k] + y2[k]) / 2, "bottom": (y1[k] + y2[k]) / 2,
            "front": near, "back": -near, "big": size, "small": -size,
            "tall": height, "short": -height, "wide": shape, "thin": -shape,
            "cut": -max(0.0, min(x1[k], y1[k], 1 - x2[k], 1 - y2[k])),
        }[axis]  # fmt: skip

    lead = min(1.0, max(-1.0, (value(j) - value(i)) / portable.CLEAR))
    better = (lead + 1) / 2
    if axis in PLACES:  # much smaller objects do not count
        ratio = math.log((x2[j] - x1[j]) * (y2[j] - y1[j]) / ((x2[i] - x1[i]) * (y2[i] - y1[i])))
        better *= min(1.0, max(0.0, (ratio - math.log(portable.SMALL)) / 0.5 + 0.5))
    return better


@pytest.mark.parametrize("num", [1, 2, 12])
@pytest.mark.parametrize("axis", AXES)
def test_ranks_equal_a_loop(num, axis):
    objects = Objects(visual(num), locations(num), C)
    match = torch.rand(3, len(objects.classes))
    cues = torch.zeros(3, len(CUES))
    cues[:, CUES.index(axis)] = torch.tensor([1.0, 0.5, 0.0])
    fit = objects.fit(cues, match)
    for p in range(3):
        for i in range(len(objects.classes)):
            counts = [objects.counts[j].item() * match[p, j].item() for j in range(match.shape[1])]
            if len(set(match[p].tolist())) == 1:  # one object: no class is named
                counts = (objects.counts * objects.alone).tolist()
            rank = sum(counts[j] * plain_better(objects, axis, j, i) for j in range(match.shape[1]))
            first, worst = 1 / (1 + rank), portable.SIZE
            if axis in PLACES:
                place = objects.absolute[PLACES.index(axis), i].item()
                first = first ** (1 - portable.ABSOLUTE) * place**portable.ABSOLUTE
                worst = portable.PLACE
            weight = cues[p, CUES.index(axis)].item()
            expected = 1 - weight + weight * (worst + (1 - worst) * first)
            assert fit[p, i].item() == pytest.approx(expected, abs=1e-5)


def row_of_dogs(num: int = 5, copies: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Dogs from left to right, each with near-copies; visual features and locations."""
    x = torch.arange(num) / num + 0.02
    boxes = torch.stack([x, torch.full((num,), 0.4), x + 0.12, torch.full((num,), 0.6)], dim=1)
    boxes = boxes.repeat(copies, 1) + 0.004 * torch.arange(copies).repeat_interleave(num)[:, None]
    scores = 0.9 - 0.01 * torch.arange(len(boxes))[:, None]
    features = torch.cat(
        [torch.eye(C)[[1] * len(boxes)], scores, torch.zeros(len(boxes), NUM_COLOURS)], dim=1
    )
    return features, torch.cat([boxes, torch.full((len(boxes), 1), 0.024)], dim=1)


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize(
    ("cues", "best"),
    [({"left": 1}, 0), ({"right": 1}, 4), ({"middle": 1}, 2), ({"left_order": 2}, 1),
     ({"right_order": 2}, 3), ({"left_order": 1}, 0), ({"right_order": 3}, 2)],
)  # fmt: skip
def test_near_copies_count_once(cues, best, copies):
    text = phrases([{"classes": [0.0, 1.0, 0.0], **cues}])
    logits = module()(*row_of_dogs(5, copies), text).logits[0].view(copies, 5)
    assert logits.argmax(dim=1).tolist() == [best] * copies
    assert torch.equal(logits, logits[:1].expand(copies, 5))


def test_order_of_boxes_does_not_matter():
    features, places = visual(30), locations(30)
    text = phrases(
        [{"classes": [1.0, 0.1, 0.1], "left": 1, "red_upper": 1}],
        [{"back": 1}, {"classes": [0.0, 0.0, 1.0], "near_it": 1}],
        [{"right_order": 2}],
    )
    order = torch.randperm(30)
    one = module()(features, places, text).logits
    other = module()(features[order], places[order], text).logits
    torch.testing.assert_close(other, one[:, order])


# --- neighbours --------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", RELATIONS)
def test_kernels_equal_a_loop(relation):
    objects = Objects(visual(9), locations(9), C)
    kernel = objects.kernels[list(RELATIONS).index(relation)]
    for j, (ax1, ay1, ax2, ay2) in enumerate(objects.boxes.tolist()):
        for i, (x1, y1, x2, y2) in enumerate(objects.boxes.tolist()):
            gap = math.hypot(max(0, ax1 - x2, x1 - ax2), max(0, ay1 - y2, y1 - ay2))
            dx, dy = (x1 + x2 - ax1 - ax2) / 2, (y1 + y2 - ay1 - ay2) / 2
            side = {"on_left": -dx, "on_right": dx, "above_it": -dy, "below_it": dy,
                    "before_it": y2 - ay2, "behind_it": ay2 - y2}.get(relation)  # fmt: skip
            expected = math.exp((-12 if relation == "touching_it" else -4) * gap)
            if side is not None:
                expected *= (min(1, max(-1, side / 0.05)) + 1) / 2
            w, h = min(x2, ax2) - max(x1, ax1), min(y2, ay2) - max(y1, ay1)
            inside = max(0, w) * max(0, h)
            union = (x2 - x1) * (y2 - y1) + (ax2 - ax1) * (ay2 - ay1) - inside
            expected *= inside / union < 0.7
            assert kernel[j, i].item() == pytest.approx(expected, abs=1e-5)


def test_the_box_near_the_landmark_wins():
    features, places = row_of_dogs()
    features[3, :C] = torch.eye(C)[2]  # a bus in place of the fourth dog
    bus = {"classes": [0.0, 0.0, 1.0]}
    dog = {"classes": [0.0, 1.0, 0.0]}
    text = phrases([dog, bus | {"on_right": 1}], [dog, bus | {"on_left": 1}], [dog])
    logits = module()(features, places, text).logits
    assert logits.argmax(dim=1)[:2].tolist() == [4, 2]
    assert logits[2, 3] < logits[0, 3]  # the bus counts more if it is mentioned


# --- colours -----------------------------------------------------------------------------------

_BGR = {
    "black": (10, 10, 10), "blue": (200, 60, 20), "brown": (20, 60, 110), "grey": (120, 120, 120),
    "green": (30, 150, 30), "orange": (10, 120, 250), "pink": (190, 150, 250),
    "purple": (160, 30, 120),
    "red": (20, 20, 220), "white": (250, 250, 250), "yellow": (20, 230, 250),
}  # fmt: skip


@pytest.mark.parametrize("colour", _BGR)
def test_basic_colours(colour):
    pixels = torch.tensor(_BGR[colour]).view(3, 1, 1) / 255
    masks = dict(zip(COLOURS, colour_masks(pixels)[:, 0, 0].tolist(), strict=True))
    assert [name for name in _BGR if masks[name]] == [colour]


def test_parts_have_their_colours_and_the_background_counts_less():
    image = torch.tensor(_BGR["green"]).view(3, 1, 1).repeat(1, 100, 100).float()
    image[:, 20:50, 40:60] = torch.tensor(_BGR["red"]).view(3, 1, 1)
    image[:, 50:80, 40:60] = torch.tensor(_BGR["blue"]).view(3, 1, 1)
    boxes = torch.tensor([[40.0, 20, 60, 80], [0.0, 0, 100, 100], [5.0, 5, 5, 5]])
    shares = box_colours(image, boxes).view(3, len(PARTS), len(COLOURS))
    of = {name: shares[:, :, i] for i, name in enumerate(COLOURS)}
    assert of["red"][0, 1] > 0.9 and of["blue"][0, 1] < 0.1
    assert of["blue"][0, 2] > 0.9 and of["red"][0, 2] < 0.1
    assert of["green"][0].max() < 0.1
    assert bool(((shares >= 0) & (shares <= 1)).all())


def test_without_image_colours_are_left_out():
    features = visual(10)
    features[:, C + 1 :] = 0
    red, plain = phrases([{"red_upper": 1, "left": 1}]), phrases([{"left": 1}])
    one, other = (module()(features, locations(10), t).logits for t in (red, plain))
    assert torch.equal(one, other)
    assert not box_colours(None, torch.rand(4, 4)).any()


def test_a_caption_is_no_choice_between_objects():
    """Of two boxes of one object, the class decides alone; otherwise the better box counts more,
    and its confidence less."""
    rest = torch.zeros(2, 1 + NUM_COLOURS)
    rest[:, 0] = torch.tensor([0.9, 0.6])
    features = torch.cat([torch.eye(C)[:2], rest], dim=1)
    dog = {"classes": [0.0, 1.0, 0.0], "near_it": 1}
    text = phrases([{"classes": [0.2, 1.0, 0.0], "caption": 1}], [{}, dog])
    caption, short = module()(features, locations(1).repeat(2, 1), text).logits.sigmoid()
    torch.testing.assert_close(caption, torch.tensor([0.2, 1.0]), rtol=0, atol=1e-5)
    expected = portable.DOUBLE * (0.9 / 0.6) ** portable.DOUBT
    assert float(short[1] / short[0]) == pytest.approx(expected)


@pytest.mark.parametrize("num", [0, 1])
@pytest.mark.parametrize("queries", [[], [[]], [[{"left": 1}], []]])
def test_no_box_one_box_and_empty_queries(num, queries):
    logits = module()(visual(num), locations(num), phrases(*queries)).logits
    assert logits.shape == (len(queries), num) and bool(logits.isfinite().all())


def test_nothing_is_ruled_out():
    text = phrases([{"classes": [1.0, 0.0, 0.0], "left": 1, "small": 1, "red_upper": 1}])
    related = module()(visual(50), locations(50), text).logits.sigmoid()
    least = portable.UNNAMED * portable.FLOOR * portable.TINY * portable.DOUBLE
    assert related.min() >= 0.99 * least and related.max() <= 1


# --- in rerank and in the heads ----------------------------------------------------------------


@pytest.fixture(scope="module")
def coco() -> list[str]:
    return list(MetadataCatalog.get("coco_2017_val").thing_classes)


def people(shirts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of people side by side and an image where they wear shirts of these colours."""
    image = np.full((100, 40 * len(shirts), 3), 120, np.uint8)
    for i, shirt in enumerate(shirts):
        image[20:60, 40 * i + 10 : 40 * i + 30] = _BGR[shirt]
    boxes = [[40 * i + 8, 5, 40 * i + 32, 95] for i in range(len(shirts))]
    return np.array(boxes, np.float32), image


def test_rerank_by_place_order_and_colour(coco):
    boxes, image = people(["red", "blue", "white", "red", "black"])
    scores, classes = np.array([0.5, 0.6, 0.9, 0.7, 0.8]), np.zeros(5, np.int64)
    queries = [
        "man on left",
        "second from the right",
        "guy in blue shirt",
        "red shirt on right",
        "",
    ]
    found = vlnms_d2.rerank(
        boxes, scores, classes, coco, queries, relatedness="Portable", image=image
    )
    assert [int(f.candidate_index[0]) for f in found] == [0, 3, 1, 3, 2]
    assert all(len(f) == 5 for f in found) and found[0].image_size == image.shape[:2]
    assert found[-1].relatedness.tolist() == [1.0] * 5
    without = vlnms_d2.rerank(boxes, scores, classes, coco, queries, relatedness="Portable")
    assert int(without[2].candidate_index[0]) == 2  # only the confidence is left
    gray = np.repeat(image[..., :1], 3, axis=2)[
        :, :, ::-1
    ]  # of negative stride, as a flipped image
    vlnms_d2.rerank(boxes, scores, classes, coco, queries, relatedness="Portable", image=gray)


@pytest.mark.parametrize("names", [["dog"], [f"thing {i}" for i in range(1202)] + ["dog_(animal)"]])
def test_any_category_list(names):
    boxes = np.array([[0, 0, 10, 10], [50, 0, 60, 10]], np.float32)
    classes = np.full(2, len(names) - 1)
    [found] = vlnms_d2.rerank(
        boxes, np.array([0.9, 0.8]), classes, names, ["right dog"], relatedness="Portable"
    )
    assert found.candidate_index.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("image", "size", "message"),
    [
        (np.zeros((4, 5), np.uint8), None, r"BGR uint8 \[H, W, 3\], got uint8 \[4, 5\]"),
        (np.zeros((4, 5, 3)), None, "got float64"),
        (
            np.zeros((4, 5, 3), np.uint8),
            (5, 4),
            r"image_size is \(5, 4\), but .* \(4, 5\)",
        ),
    ],
)
def test_wrong_images_are_refused(image, size, message):
    with pytest.raises(ValueError, match=message):
        vlnms_d2.rerank(np.zeros((1, 4)), [0.5], [0], ["dog"], ["a"], image=image, image_size=size)


@pytest.mark.parametrize("head", ["VLNMSHead", "VLNMSRes5Head", "VLNMSCascadeHead"])
def test_heads_give_what_the_module_gives(config, head):
    cfg = config(head, "Portable")
    names = ("cup", "dog", "dining table", "person", "car")
    cfg.MODEL.VLNMS.CATEGORY.NAMES = names
    model = build(cfg)
    queries = ["left red dog", ""]
    given = image_input(0, query=queries)
    with torch.no_grad():
        [output] = model([given])
    found, silent = split_by_query(output["instances"], 2)
    assert len(found) > 3 and silent.relatedness.tolist() == [1.0] * len(silent)
    assert found.relatedness.unique().numel() > 3
    # Everything before the branch again; the image is read back from the network's input.
    seen = []
    branch = model.roi_heads.vlnms
    original = branch.relatedness.describe
    branch.relatedness.describe = lambda *args: seen.append(args) or original(*args)
    with torch.no_grad():
        model([given])
    [(candidates, num_classes, image)] = seen
    assert isinstance(candidates, Candidates) and num_classes == 5
    with torch.no_grad():
        colours = original(candidates, num_classes, image)[:, 6:]
    torch.testing.assert_close(colours, box_colours(given["image"].float(), candidates.boxes))


@pytest.fixture(scope="module")
def encoder() -> PortablePhrases:
    return PortablePhrases(category_names=NAMES)


def test_a_caption_is_one_phrase_with_the_relatedness_of_category(encoder):
    caption = "A wide view of the old street between the houses with a dog and a bus."
    text = encoder([caption, "a street with a dog"])
    assert text.mask.sum(dim=1).tolist() == [1, 2]
    related = category_relatedness(encoder.matcher.best_cosines([caption]))[0]
    assert torch.equal(text.words[0, 0, :C], related) and 0 < related.min() < related.max()
    assert text.words[0, 0, C:].tolist() == [float(cue == "caption") for cue in CUES]


def test_tokens_are_the_words_of_the_phrases(encoder):
    assert encoder.tokenize("the red bus left of the dog") == ["bus", "dog"]


def test_other_category_names_than_classes_are_refused():
    with pytest.raises(ValueError, match="4 classes, but 3 category names"):
        Portable(visual_dim=C + 1, text_dim=C + len(CUES))


def test_there_are_no_weights(coco):
    assert not PortablePhrases(category_names=coco).state_dict() and not module().state_dict()
