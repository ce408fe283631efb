"""What a RefShapes image contains, before it is drawn and after: plain records shared by the
painter, which draws them, and the expression writer, which describes them."""

from __future__ import annotations

from dataclasses import dataclass

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "black")
PATTERNS = ("plain", "striped", "dotted", "checked")
SIZES = ("small", "medium", "large")
MIN_WIDTH, MIN_HEIGHT = 320, 240
"""Minimum image size in pixels that fits the fullest scene."""

_SIZE_PROMINENCE = {"small": 1.0, "medium": 3.0, "large": 5.0}


@dataclass(frozen=True)
class SceneObject:
    """One drawn object of a category.

    Attributes:
        id: annotation id, unique over the data set.
        category, color, pattern, size: entries of `CATEGORIES`, `COLORS`, `PATTERNS`, `SIZES`.
        box: (x1, y1, x2, y2) of the visible pixels, in pixels.
        visible: share of the object's pixels that no later object covers, in (0, 1].
        segmentation: COCO polygons of the visible pixels, each [x1, y1, x2, y2, ...] in pixels.
        area: number of visible pixels.
    """

    id: int
    category: str
    color: str
    pattern: str
    size: str
    box: tuple[float, float, float, float]
    visible: float
    segmentation: tuple[tuple[float, ...], ...]
    area: float

    @property
    def center(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def prominence(self) -> float:
        """How readily people speak of the object, from above 0 to 5.

        The referents of the real sets are large and in plain view: RefCOCOg asked for objects
        that cover at least 5% of the image.
        """
        return _SIZE_PROMINENCE[self.size] * self.visible**4


@dataclass(frozen=True)
class Scene:
    """One image: its size in pixels, its split and its objects, those drawn first first."""

    image_id: int
    split: str
    width: int
    height: int
    objects: tuple[SceneObject, ...]
