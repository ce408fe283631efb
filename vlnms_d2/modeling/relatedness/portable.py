"""Relatedness by hand rules: the class, place, size, order, colour and surroundings of a candidate
against what the query says of them. It has no weights and works with any detector."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from ...language.phrases import (
    AXES,
    COLOURS,
    CUES,
    PARTS,
    PLACES,
    RELATIONS,
    join_phrases,
    split_phrases,
)
from ..text.build import TEXT_ENCODER_REGISTRY, TextFeatures, pad_features
from .build import RELATEDNESS_REGISTRY, Relatedness, RelatednessOutput, box_locations
from .category import CategoryMentions, category_relatedness

NUM_COLOURS = len(PARTS) * len(COLOURS)
_COLUMN = {cue: column for column, cue in enumerate(CUES)}
_NEAR_COPY = 0.5  # IoU of candidates of one class that are one object
_MAX_SIDE = 160  # of the image in which colours are counted

# Chosen on the photos "choose" of projects/Portable, and on the sets for development of rerank.md.
# Factor of an object that does not fit a cue at all; one that fits has 1.
PLACE, SIZE, ORDER, COLOUR, RELATION = 0.05, 0.4, 0.3, 0.25, 0.3
# What is not mentioned is not thereby absent: least factors of a class that is not named and of
# an object that fits no cue, and the factor of an object that is named beside the one meant.
UNNAMED, FLOOR, LANDMARK = 0.002, 0.15, 0.2
# The confidence counts as c^0.75 where it is above UNSURE: exponent of the factor of r.
DOUBT = 0.25
# People speak of what they see: the factor of the tiniest object, and the share of the image from
# which it is 1. Without a named class, a worse box of an object of another class has the last one.
TINY, VISIBLE, DOUBLE = 0.7, 0.03, 0.6
UNSURE, SURE = 0.15, 0.4  # confidence up to which an object does not count in ranks; counts as one
ABSOLUTE = 0.8  # weight of the place in the image; the rest is that of the rank
SMALL = 0.15  # objects below this share of another one's area do not count in its rank
CLEAR = 0.02  # difference, in shares of the image, from which an order is clear
SPREAD = 0.5  # of "second", "third", in ranks


def box_colours(
    image: Tensor | None, boxes: Tensor, restore: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Shares of the colours in the parts of boxes, less half of what is around the box.

    Args:
        image: BGR [3, H, W], values from 0 to 255, or None.
        boxes: float [N, 4], xyxy in pixels of `image`.
        restore: gives these values if `image` has others; it gets a smaller image.

    Returns:
        float [N, parts * colours], in the order of `PARTS`, then `COLOURS`; zeros without image.
    """
    if image is None or not len(boxes) or not image.numel():
        return boxes.new_zeros(len(boxes), NUM_COLOURS)
    height, width = image.shape[1:]
    scale = min(1.0, _MAX_SIDE / max(height, width))
    small_size = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = F.interpolate(image[None].to(boxes.dtype), small_size, mode="area")[0]
    pixels = (pixels if restore is None else restore(pixels)).contiguous() / 255
    sums = F.pad(colour_masks(pixels).cumsum(1).cumsum(2), (1, 0, 1, 0))  # integral images
    shares = _shares(sums, boxes / boxes.new_tensor([width, height] * 2))  # [N, 1 + parts, K]
    return (1.5 * shares[:, 1:] - 0.5 * shares[:, :1]).clamp(0, 1).flatten(1).to(boxes.dtype)


def colour_masks(pixels: Tensor) -> Tensor:
    """Which of `COLOURS` each pixel has: float [colours, H, W] of zeros and ones, for BGR pixels
    from 0 to 1, float [3, H, W]."""
    blue, green, red = pixels
    value, least = pixels.amax(0), pixels.amin(0)
    chroma = (value - least).clamp(min=1e-6)
    saturation = chroma / value.clamp(min=1e-6)
    hue = torch.where(
        value == red,
        (green - blue) / chroma % 6,
        torch.where(value == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    hue = 60 * hue  # in degrees
    black = (value < 0.2) | ((value < 0.32) & (saturation < 0.3))
    plain = ~black & (saturation < 0.16)
    white = plain & (value > 0.7)
    vivid = ~black & ~plain
    reddish, orangish = vivid & ((hue < 15) | (hue >= 345)), vivid & (hue >= 15) & (hue < 42)
    pale = (saturation < 0.5) & (value > 0.6)
    warm = reddish | orangish
    brown = warm & ((value < 0.6) | (saturation < 0.55)) & ~(reddish & (saturation > 0.55))
    masks = {
        "black": black,
        "white": white | (vivid & (saturation < 0.22) & (value > 0.8)),
        "grey": plain & ~white,
        "brown": brown & ~(reddish & pale),
        "pink": (reddish & pale) | (vivid & (hue >= 300) & (hue < 345)),
        "red": reddish & (saturation > 0.55),
        "orange": orangish & ~brown,
        "yellow": vivid & (hue >= 42) & (hue < 70),
        "green": vivid & (hue >= 70) & (hue < 170),
        "blue": vivid & (hue >= 170) & (hue < 262),
        "purple": vivid & (hue >= 262) & (hue < 320),
        "light": (value > 0.65) & (saturation < 0.35),
        "dark": value < 0.35,
    }
    return torch.stack([masks[colour] for colour in COLOURS]).to(pixels.dtype)


# Around a box, and its whole, upper and lower part and head: x1, y1, x2, y2 in shares of the box.
_REGIONS = (
    (-0.25, -0.25, 1.25, 1.25),
    (0.2, 0.1, 0.8, 0.9),
    (0.25, 0.15, 0.75, 0.5),
    (0.25, 0.5, 0.75, 0.9),
    (0.25, 0.0, 0.75, 0.2),
)


def _shares(sums: Tensor, boxes: Tensor) -> Tensor:
    """Means over `_REGIONS` of boxes, [N, 4] in shares of the image, from integral images
    [K, H + 1, W + 1]: [N, regions, K]. Every region has at least one pixel."""
    num, height, width = sums.shape[0], sums.shape[1] - 1, sums.shape[2] - 1
    size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)[:, None]
    regions = boxes[:, :2].repeat(1, 2)[:, None] + boxes.new_tensor(_REGIONS) * size
    x1, y1, x2, y2 = (regions * regions.new_tensor([width, height] * 2)).unbind(-1)
    x1, y1 = x1.floor().long().clamp(0, width - 1), y1.floor().long().clamp(0, height - 1)
    x2 = x2.ceil().long().clamp(max=width).maximum(x1 + 1)  # [N, regions]
    y2 = y2.ceil().long().clamp(max=height).maximum(y1 + 1)
    corners = torch.stack([y2 * (width + 1) + x2, y1 * (width + 1) + x2,
                           y2 * (width + 1) + x1, y1 * (width + 1) + x1])  # fmt: skip
    at = sums.flatten(1).index_select(1, corners.flatten()).view(num, *corners.shape)
    total = at[:, 0] - at[:, 1] - at[:, 2] + at[:, 3]  # [K, N, regions]
    return (total / ((x2 - x1) * (y2 - y1))).permute(1, 2, 0)


@RELATEDNESS_REGISTRY.register()
class Portable(Relatedness):
    """Relatedness from hand rules on the class, place, size, order, colours and surroundings.

    Candidates of one class that overlap are one object and get the same relatedness. Ranks are
    counted among the objects of the class that the query names.

    Args:
        visual_dim: C, the number of classes.
        text_dim: of `PortablePhrases`.
        pixel_mean, pixel_std: of the image that `describe` gets, in the order of its channels.
        is_rgb: whether the first of these is red, not blue.

    Raises:
        ValueError: the number of category names is not C.
    """

    learns = False
    compares_boxes = True
    text_encoder = "PortablePhrases"
    visual_encoder = "cues"

    @configurable
    def __init__(
        self,
        *,
        visual_dim: int,
        text_dim: int,
        pixel_mean: Sequence[float] = (0.0, 0.0, 0.0),
        pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
        is_rgb: bool = False,
    ):
        super().__init__()
        self.num_classes = visual_dim
        if text_dim != visual_dim + len(CUES):
            raise ValueError(f"{visual_dim} classes, but {text_dim - len(CUES)} category names")
        self.mean, self.std, self.is_rgb = tuple(pixel_mean), tuple(pixel_std), is_rgb

    @classmethod
    def from_config(cls, cfg, visual_dim: int, text_dim: int) -> dict:
        return {
            "visual_dim": visual_dim,
            "text_dim": text_dim,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "is_rgb": cfg.INPUT.FORMAT == "RGB",
        }

    def describe(self, candidates, num_classes: int, image: Tensor | None = None) -> Tensor:
        """See `Relatedness.describe`: float [N, C + 1 + parts * colours], the one-hot class, c and
        the colours, which are zeros without an image."""
        boxes, scores = candidates.boxes, candidates.scores
        one_hot = super().describe(candidates, num_classes)
        colours = box_colours(image, boxes, self._restore)
        return torch.cat([one_hot, scores[:, None], colours], dim=1)

    def _restore(self, image: Tensor) -> Tensor:
        """BGR values from 0 to 255 of a normalised image [3, H, W]."""
        mean, std = (image.new_tensor(x)[:, None, None] for x in (self.mean, self.std))
        image = image * std + mean
        return image.flip(0) if self.is_rgb else image

    def forward(
        self, visual: Tensor, locations: Tensor, text: TextFeatures, with_attention: bool = False
    ) -> RelatednessOutput:
        """See `Relatedness.forward`; `visual` is of `describe`, and `text` has phrases, words
        [Q, L, C + cues], of `PortablePhrases`. There is no attention."""
        if not len(visual) or not text.mask.numel():
            return RelatednessOutput(visual.new_zeros(len(text), len(visual)))
        objects = Objects(visual, locations, self.num_classes)
        features = text.words.flatten(0, 1)  # [Q * L, C + cues]
        match = features[:, : self.num_classes][:, objects.classes]  # [Q * L, R]
        fit = objects.fit(features[:, self.num_classes :], match)  # [Q * L, R]
        match, fit = (x.unflatten(0, text.mask.shape) for x in (match, fit))
        described, landmark = fit[:, 0], torch.zeros_like(fit[:, 0])
        for i in range(1, text.mask.shape[1]):
            there = match[:, i] * fit[:, i]  # [Q, R], 0 without a phrase
            relation = text.words[:, i, -len(RELATIONS) :].argmax(dim=-1)  # [Q]
            near = _factor(objects.near(there, relation), RELATION)
            described = described * torch.where(text.mask[:, i, None], near, 1.0)
            landmark = torch.maximum(landmark, there)
        related = _factor(match[:, 0], UNNAMED) * _factor(described, FLOOR)  # [Q, R]
        related = torch.maximum(related, landmark * LANDMARK)
        prior = _factor((objects.area / VISIBLE).clamp(max=1).sqrt(), TINY)
        prior = prior * (UNSURE / objects.scores).clamp(max=1) ** DOUBT
        prior = prior * torch.where(_names_class(match[:, 0]) | objects.alone, 1.0, DOUBLE)
        # A caption is no choice between objects: Category's relatedness.
        is_caption = text.words[:, 0, self.num_classes + _COLUMN["caption"], None] > 0  # [Q, 1]
        related = torch.where(is_caption, match[:, 0], related * prior)
        return RelatednessOutput(related.clamp(1e-6, 1 - 1e-6).logit()[:, objects.object_of])

    def bytes_per_query(self, num_boxes: int, num_words: int) -> int:
        return 4 * num_boxes * (num_boxes + (4 + 2 * NUM_COLOURS) * num_words)


def _factor(fit: Tensor, worst: float) -> Tensor:
    return worst + (1 - worst) * fit


def _names_class(match: Tensor) -> Tensor:
    """Whether phrases distinguish the classes of the objects: [P, R] to bool [P, 1]."""
    return match.amax(dim=1, keepdim=True) > match.amin(dim=1, keepdim=True)


class Objects:
    """The R objects among N candidates: what class-wise NMS leaves.

    Attributes:
        object_of: int64 [N], of each candidate.
        classes: int64 [R].
        scores: float [R], c.
        counts: float [R], how much of an object it is, by its confidence.
        alone: bool [R], whether no other class has a better box of it.
        kernels: float [relations, R (j), R (i)], how well i stands in each relation to j.
    """

    def __init__(self, visual: Tensor, locations: Tensor, num_classes: int):
        visual, locations = visual.float(), locations.float()
        classes, scores = visual[:, :num_classes].argmax(dim=1), visual[:, num_classes]
        boxes = locations[:, :4]
        kept = batched_nms(boxes, scores, classes, _NEAR_COPY)
        same = classes[:, None] == classes[kept]
        self.object_of = (box_iou(boxes, boxes[kept]) * same).argmax(dim=1)  # [N]
        self.object_of[kept] = torch.arange(len(kept), device=kept.device)
        self.classes, self.boxes = classes[kept], boxes[kept]
        self.colours = visual[kept, num_classes + 1 :]
        self.scores = scores[kept].clamp(min=1e-6)
        self.counts = ((self.scores - UNSURE) / (SURE - UNSURE)).clamp(0, 1)
        overlaps = box_iou(self.boxes, self.boxes).triu(1) > _NEAR_COPY  # kept is sorted by score
        self.alone = ~overlaps.any(dim=0)
        x1, y1, x2, y2 = self.boxes.T
        width, height = (x2 - x1).clamp(min=1e-6), (y2 - y1).clamp(min=1e-6)
        self.center = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2], dim=1)
        self.area = width * height
        size = self.area.sqrt()
        x, y = self.center.unbind(1)
        shape = (width / height).log() / 4
        near = (y2 + size) / 2  # large and low in the image
        border = -torch.stack([x1, y1, 1 - x2, 1 - y2]).amin(dim=0).clamp(min=0)
        self.values = torch.stack(  # [axes, R], higher for what fits better
            [-x, x, -y, y, near, -near, size, -size, height, -height, shape, -shape, border]
        )
        absolute = torch.stack([1 - x, x, 1 - y, y, near.clamp(0, 1), 1 - near.clamp(0, 1)])
        self.absolute = absolute.clamp(0, 1)  # [places, R]
        self._better: dict[int, Tensor] = {}

    def better(self, axis: int) -> Tensor:
        """How much object j is better than i on an axis: float [R (j), R (i)]."""
        if axis not in self._better:
            value, area = self.values[axis], self.area.log()
            better = ((value[:, None] - value) / CLEAR).clamp(-1, 1) / 2 + 0.5
            if axis < len(PLACES):  # much smaller objects do not count
                ratio = area[:, None] - area - math.log(SMALL)
                better = better * (ratio / 0.5 + 0.5).clamp(0, 1)
            self._better[axis] = better.fill_diagonal_(0)
        return self._better[axis]

    def fit(self, cues: Tensor, match: Tensor) -> Tensor:
        """How well the objects fit the cues of P phrases, [P, cues], from 0 to 1: [P, R]. `match`,
        [P, R], is how well the class fits."""
        weights = torch.where(
            _names_class(match), match * self.counts, self.counts * self.alone
        )  # [P, R]
        fit = torch.ones_like(match)
        for number, axis in enumerate(AXES):
            weight = cues[:, _COLUMN[axis], None]
            order = cues[:, _COLUMN[f"{axis}_order"], None] if axis in PLACES else weight * 0
            if not bool((weight + order).any()):
                continue
            rank = weights @ self.better(number)  # [P, R], objects that fit better
            first = 1 / (1 + rank)
            worst = PLACE if axis in PLACES else SIZE
            if axis in PLACES:
                first = first ** (1 - ABSOLUTE) * self.absolute[number] ** ABSOLUTE
                off = (rank - order + 1) / (SPREAD * (1 + order / 2))
                in_order = _factor(torch.exp(-off.square() / 2), ORDER)
                fit = fit * torch.where(order > 0, in_order, 1.0)
            fit = fit * (1 - weight + weight * _factor(first, worst))
        weight = cues[:, _COLUMN["middle"], None]
        if bool(weight.any()):
            left, right = weights @ self.better(0), weights @ self.better(1)
            balance = 1 - (left - right).abs() / (left + right).clamp(min=1)
            center = 1 - 2 * (self.center[:, 0] - 0.5).abs()
            middle = (balance * center).clamp(min=0).sqrt()
            fit = fit * (1 - weight + weight * _factor(middle, PLACE))
        asked = cues[:, _COLUMN["black_whole"] :][:, :NUM_COLOURS]
        if bool(asked.any()) and bool(self.colours.any()):
            for column in asked.any(dim=0).nonzero()[:, 0].tolist():
                weight, share = asked[:, column, None], self.colours[:, column]
                most = (share * weights).amax(dim=1, keepdim=True).clamp(min=0.2)
                fit = fit * (1 - weight + weight * _factor((share / most).clamp(max=1), COLOUR))
        return fit

    def near(self, landmark: Tensor, relation: Tensor) -> Tensor:
        """How well the objects stand in a relation, int64 [Q], to landmarks, from 0 to 1: [Q, R].
        `landmark`, [Q, R], is how well the objects fit as the landmark."""
        best = ((landmark * self.counts)[:, :, None] * self.kernels[relation]).amax(dim=1)  # [Q, R]
        return best / best.amax(dim=1, keepdim=True).clamp(min=1e-6)

    @cached_property
    def kernels(self) -> Tensor:
        boxes, center = self.boxes, self.center
        gap = boxes[:, None, :2] - boxes[:, 2:]  # [R, R, 2]
        gap = gap.maximum(gap.transpose(0, 1)).clamp(min=0).norm(dim=-1)  # [R, R], 0 if they touch
        close = torch.exp(-4 * gap)
        other = box_iou(boxes, boxes) < 0.7  # an object has no relation to itself
        dx, dy = (center - center[:, None]).unbind(-1)  # of i from j
        foot = boxes[None, :, 3] - boxes[:, None, 3]
        side = [-dx, dx, -dy, dy, foot, -foot]
        kernels = [close * (value / 0.05).clamp(-1, 1).add(1).div(2) for value in side]
        return torch.stack([*kernels, close, torch.exp(-12 * gap)]) * other


@TEXT_ENCODER_REGISTRY.register()
class PortablePhrases(CategoryMentions):
    """The phrases of a query: how well each class fits, and the cues. It has no weights; for the
    arguments see `CategoryMentions`."""

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.output_dim += len(CUES)
        person = category_relatedness(self.matcher.best_cosines(["person"]))[0]
        self.register_buffer("person", person, persistent=False)

    def tokenize(self, query: str) -> list[str]:
        """The words of each phrase of `query`."""
        return [" ".join(phrase.words) for phrase in split_phrases(query, self.matcher.synonyms)]

    def forward(self, queries: list[str]) -> TextFeatures:
        """Encode queries.

        Returns:
            TextFeatures with words [Q, L, C + cues], a row per phrase: how well each class fits
            (1 for all if the phrase names none), then `CUES`. A query that says nothing has none.
        """
        split = [split_phrases(query, self.matcher.synonyms) for query in queries]
        texts = list(dict.fromkeys(" ".join(p.words) for phrases in split for p in phrases))
        match = category_relatedness(self.matcher.best_cosines(texts)).to(self.person.device)
        row_of = {text: row for row, text in enumerate(texts)}
        encoded = []
        for phrases in split:
            rows = [match[row_of[" ".join(p.words)]] for p in phrases]
            named = [bool((row < 1).any()) for row in rows]
            joined = join_phrases(phrases, named)
            if not named[0] and phrases[0].is_person:
                rows[0] = self.person
            match_of = {id(phrase): row for phrase, row in zip(phrases, rows, strict=True)}
            says = named[0] or phrases[0].cues or phrases[0].is_person or len(joined) > 1
            table = self.person.new_zeros(len(joined) if says else 0, self.output_dim)
            for row, phrase in zip(table, joined, strict=False):
                row[: len(self.person)] = match_of[id(phrase)]
                relation = {phrase.relation: 1.0} if phrase.relation else {}
                for cue, value in (phrase.cues | relation).items():
                    row[len(self.person) + _COLUMN[cue]] = value
            encoded.append(table.cpu())
        return pad_features(encoded, self.output_dim, self.person.device)


def portable_relatedness(
    text: TextFeatures, candidates, image_size: tuple[int, int], image: np.ndarray | None = None
) -> Tensor:
    """Relatedness of detections from anywhere.

    Args:
        text: Q queries, from `PortablePhrases`.
        candidates: as for `Relatedness.describe`.
        image_size: (height, width) in pixels.
        image: BGR uint8 [H, W, 3]; None leaves the colours out.

    Returns:
        float [Q, N]; 1 for a query that says nothing.
    """
    text_dim = text.words.shape[2]
    module = Portable(visual_dim=text_dim - len(CUES), text_dim=text_dim)
    if image is not None:
        image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    visual = module.describe(candidates, module.num_classes, image)
    output = module(visual, box_locations(candidates.boxes, image_size), text)
    return torch.where(text.mask.any(dim=1, keepdim=True), output.logits.sigmoid(), 1.0)
