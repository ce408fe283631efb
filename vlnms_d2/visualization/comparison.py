"""One picture per query: the detector's own proposals beside those that the query keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from detectron2.structures import Instances
from PIL import Image, ImageDraw

from .drawing import (
    DROPPED,
    FAINT,
    GAINED,
    GREEN,
    IN_BOTH,
    INK,
    MARGIN,
    ORANGE,
    WHITE,
    Box,
    Style,
    draw_box,
    draw_dashed,
    get_font,
)
from .labels import draw_labels, label_texts
from .records import hits, proposal_records, same_boxes, word_weights
from .strips import draw_header, draw_legend

PANEL_WIDTH, PANEL_MAX_HEIGHT, PANEL_MIN_HEIGHT = 640, 720, 120
TITLE_HEIGHT = 48


class View(NamedTuple):
    """Where an image lies in its panel: `panel = image * scale + (left, top)`, in pixels."""

    scale: float
    left: int
    top: int
    width: int
    height: int
    panel_height: int


class Side(NamedTuple):
    """What one panel shows: a title, a line below it, and proposals with a style each."""

    title: str
    subtitle: str
    instances: Instances
    styles: list[Style]


def draw_comparison(
    image: np.ndarray,
    query: str,
    words: Sequence[str],
    attention: np.ndarray | None,
    detector: Instances,
    aware: Instances,
    class_names: Sequence[str] = (),
    *,
    referent: Sequence[float] | None = None,
    masks: bool = False,
) -> np.ndarray:
    """Draw K proposals of the detector beside the K that the query keeps.

    Boxes are blue where both sides have them, orange where only the query does, grey where only
    the detector does (by IoU > 0.5, whatever the class).

    Args:
        image: uint8 [H, W, 3], BGR.
        query: as typed; shown where it differs from its words.
        words: the L words that the text encoder reads.
        attention: float [L] or, where it depends on the box, [n, L], of which the mean is shown;
            columns beyond L are padding. None: the words are shown without.
        detector: the detector's proposals in pixels of `image`, by falling `scores`; only its
            first K are drawn.
        aware: the query's K proposals, with `cls_scores` and `relatedness`.
        class_names: by class; a class beyond them is shown as its number.
        referent: box xyxy in pixels of `image` that the query means, if known.
        masks: also draw `pred_masks`, where present.

    Returns:
        uint8 [H', W', 3], BGR: two panels of `PANEL_WIDTH` under the query.
    """
    detector, aware = detector[: len(aware)].to("cpu"), aware.to("cpu")
    kept, found = same_boxes(detector, aware)
    left = Side(
        f"Detector alone: its {_count(len(detector), 'best proposal')}",
        "ranked by class confidence c",
        detector,
        [IN_BOTH if same else DROPPED for same in kept],
    )
    right = Side(
        f"With the query: {_count(len(aware), 'proposal')} kept",
        "ranked by s, made of class confidence c and relatedness r",
        aware,
        [IN_BOTH if same else GAINED for same in found],
    )
    view = fit_view(*image.shape[:2])
    panels = [
        _draw_side(side, _paste(image, view, side, masks), view, class_names, referent)
        for side in (left, right)
    ]
    width = 2 * PANEL_WIDTH + 3 * MARGIN
    parts = [
        draw_header(query, words, *word_weights(attention, len(words)), width),
        _beside(panels, width),
        draw_legend(width, referent is not None),
    ]
    return np.ascontiguousarray(np.vstack([np.asarray(part) for part in parts])[:, :, ::-1])


def fit_view(height: int, width: int) -> View:
    """The largest view of an image of this size, in pixels, that a panel has room for."""
    scale = min(PANEL_WIDTH / width, PANEL_MAX_HEIGHT / height)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    panel_height = max(h, PANEL_MIN_HEIGHT)
    return View(scale, (PANEL_WIDTH - w) // 2, (panel_height - h) // 2, w, h, panel_height)


def _draw_side(
    side: Side,
    panel: Image.Image,
    view: View,
    class_names: Sequence[str],
    referent: Sequence[float] | None,
) -> Image.Image:
    """The proposals on a panel, which already has the image, under a title."""
    draw = ImageDraw.Draw(panel, "RGBA")
    boxes = [_to_panel(box, view) for box in side.instances.pred_boxes.tensor.tolist()]
    # What matters most is drawn last: dimmed boxes lie below, and of the others lower ranks.
    for i in sorted(range(len(boxes)), key=lambda i: (side.styles[i] != DROPPED, -i)):
        draw_box(draw, boxes[i], side.styles[i])
    if referent is not None:
        draw_dashed(draw, _around(_to_panel(referent, view), panel.size))
    texts = label_texts(proposal_records(side.instances, class_names))
    left_out = draw_labels(draw, panel.size, boxes, texts, side.styles)
    subtitle = side.subtitle
    if left_out:
        subtitle += f"; {_count(left_out, 'label')} left out"
    titled = Image.new("RGB", (panel.width, TITLE_HEIGHT + panel.height), WHITE)
    titled.paste(panel, (0, TITLE_HEIGHT))
    draw = ImageDraw.Draw(titled)
    draw.text((0, 2), side.title, INK, get_font(19, bold=True))
    draw.text((0, 27), subtitle, FAINT, get_font(14))
    if referent is not None:
        hit = hits(side.instances, referent)
        verdict, color = ("✓ object found", GREEN) if hit else ("✗ object missed", ORANGE)
        draw.text((panel.width, 2), verdict, color, get_font(19, bold=True), anchor="ra")
    return titled


def _paste(image: np.ndarray, view: View, side: Side, masks: bool) -> Image.Image:
    """A panel with the image at its place, under translucent masks if asked for."""
    size = (view.width, view.height)
    how = cv2.INTER_AREA if view.scale < 1 else cv2.INTER_CUBIC
    scaled = np.ascontiguousarray(cv2.resize(image, size, interpolation=how)[:, :, ::-1])
    if masks and side.instances.has("pred_masks"):
        for mask, style in zip(side.instances.pred_masks.numpy(), side.styles, strict=True):
            small = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
            inside = small > 0
            scaled[inside] = 0.65 * scaled[inside] + 0.35 * np.array(style.color)
            contours, _ = cv2.findContours(small, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(scaled, contours, -1, style.color, 1)
    panel = Image.new("RGB", (PANEL_WIDTH, view.panel_height), (235, 235, 235))
    panel.paste(Image.fromarray(scaled), (view.left, view.top))
    return panel


def _to_panel(box: Sequence[float], view: View) -> Box:
    """The first and last pixels, in the panel, of a box in pixels of the image."""
    x1, y1, x2, y2 = (round(v * view.scale) for v in box)
    return x1 + view.left, y1 + view.top, max(x1, x2 - 1) + view.left, max(y1, y2 - 1) + view.top


def _around(box: Box, panel_size: tuple[int, int]) -> Box:
    """A little outside of a box, where its line hides nothing, but inside the panel."""
    x1, y1, x2, y2 = box
    right, bottom = panel_size[0] - 2, panel_size[1] - 2
    return max(x1 - 5, 0), max(y1 - 5, 0), min(x2 + 5, right), min(y2 + 5, bottom)


def _beside(panels: Sequence[Image.Image], width: int) -> Image.Image:
    strip = Image.new("RGB", (width, panels[0].height), WHITE)
    for i, panel in enumerate(panels):
        strip.paste(panel, (MARGIN + i * (PANEL_WIDTH + MARGIN), 0))
    return strip


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
