"""Query-aware proposals beside those of the detector alone, as pictures.

The pictures are drawn with Pillow. Detectron2's Visualizer puts every label at a corner of its box,
over other labels and across the border of the image. Proposals lie on top of each other (boxes of
several classes on one object), so here each label goes where it covers no other label.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from PIL import Image, ImageDraw, ImageFont

IOU_THRESHOLD = 0.5
"""Two boxes show the same object, and a proposal hits the referent, above this IoU."""

# Sizes in pixels.
PANEL_WIDTH, PANEL_MAX_HEIGHT, PANEL_MIN_HEIGHT = 640, 720, 120
TITLE_HEIGHT, MARGIN = 48, 12
MAX_LABELS = 20  # per panel; more would hide the image
MAX_NAME = 20  # characters of a class name

Box = tuple[int, int, int, int]  # xyxy in pixels of a panel

# RGB. Blue and orange are from Okabe and Ito's palette, safe for colour-blind readers.
BLUE, ORANGE, GREY = (0, 100, 180), (213, 94, 0), (110, 110, 110)
GREEN, INK, FAINT, WHITE = (0, 130, 90), (30, 30, 30), (105, 105, 105), (255, 255, 255)
PALE, BACKGROUND = (226, 238, 248), (235, 235, 235)


class Style(NamedTuple):
    """How a box is drawn: RGB colour, line width in pixels, opacity from 0 to 255."""

    color: tuple[int, int, int]
    width: int
    alpha: int


IN_BOTH, GAINED, DROPPED = Style(BLUE, 2, 255), Style(ORANGE, 4, 255), Style(GREY, 1, 190)


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
    """Draw the detector's best K proposals beside the K that the query keeps.

    Boxes are blue where both sides have them, orange where only the query does, grey where only
    the detector does (by IoU > 0.5, whatever the class).

    Args:
        image: uint8 [H, W, 3], BGR.
        query: as typed; shown if it differs from its words.
        words: the L words that the text encoder reads.
        attention: word attention, float [L] or, if it depends on the box, [n, L], of which the
            mean is shown; columns beyond L are padding. None: the words are not shaded.
        detector: the detector's proposals in pixels of `image`, in descending order of `scores`;
            only the first K are drawn.
        aware: the query's K proposals, with `cls_scores` and `relatedness`.
        class_names: name of each class; a class without one is shown as its number.
        referent: box (xyxy in pixels of `image`) of the object that the query means, if known.
        masks: also draw `pred_masks`, where present.

    Returns:
        uint8 [H', W', 3], BGR: two panels of `PANEL_WIDTH` below the query.
    """
    detector, aware = detector[: len(aware)].to("cpu"), aware.to("cpu")
    same = pairwise_iou(detector.pred_boxes, aware.pred_boxes) > IOU_THRESHOLD  # [K, K]
    common: dict[str, Any] = {"class_names": class_names, "referent": referent, "masks": masks}
    title = f"Detector alone: its {_plural(len(detector), 'best proposal')}"
    styles = [IN_BOTH if kept else DROPPED for kept in same.any(dim=1)]
    left = _draw_panel(image, title, "ranked by class confidence c", detector, styles, **common)
    title = f"With the query: {_plural(len(aware), 'proposal')} kept"
    subtitle = "ranked by s, the fusion of class confidence c and relatedness r"
    styles = [IN_BOTH if known else GAINED for known in same.any(dim=0)]
    right = _draw_panel(image, title, subtitle, aware, styles, **common)
    width = 2 * PANEL_WIDTH + 3 * MARGIN
    header = _draw_header(query, words, *word_weights(attention, len(words)), width)
    legend = _draw_legend(width, referent is not None)
    picture = Image.new("RGB", (width, header.height + left.height + legend.height), WHITE)
    picture.paste(header, (0, 0))
    picture.paste(left, (MARGIN, header.height))
    picture.paste(right, (PANEL_WIDTH + 2 * MARGIN, header.height))
    picture.paste(legend, (0, picture.height - legend.height))
    return np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])


def _draw_panel(
    image: np.ndarray,
    title: str,
    subtitle: str,
    instances: Instances,
    styles: Sequence[Style],
    class_names: Sequence[str],
    referent: Sequence[float] | None,
    masks: bool,
) -> Image.Image:
    """The image, as large as a panel has room for, with its proposals, under a title."""
    height, width = image.shape[:2]
    scale = min(PANEL_WIDTH / width, PANEL_MAX_HEIGHT / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    panel = Image.new("RGB", (PANEL_WIDTH, max(size[1], PANEL_MIN_HEIGHT)), BACKGROUND)
    left, top = ((outer - inner) // 2 for outer, inner in zip(panel.size, size, strict=True))

    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    scaled = np.ascontiguousarray(cv2.resize(image, size, interpolation=interpolation)[:, :, ::-1])
    if masks and instances.has("pred_masks"):
        _draw_masks(scaled, instances.pred_masks.numpy(), styles)
    panel.paste(Image.fromarray(scaled), (left, top))

    def to_panel(box: Sequence[float]) -> Box:
        x1, y1, x2, y2 = (round(v * scale) for v in box)
        return x1 + left, y1 + top, max(x1, x2 - 1) + left, max(y1, y2 - 1) + top

    draw = ImageDraw.Draw(panel, "RGBA")
    boxes = [to_panel(box) for box in instances.pred_boxes.tensor.tolist()]
    # What matters most is drawn last: dropped boxes first, then the others from low to high rank.
    for i in sorted(range(len(boxes)), key=lambda i: (styles[i] != DROPPED, -i)):
        _draw_box(draw, boxes[i], styles[i])
    if referent is not None:
        # A few pixels outside of the box, where the line hides nothing.
        x1, y1, x2, y2 = to_panel(referent)
        x2, y2 = min(x2 + 5, panel.width - 2), min(y2 + 5, panel.height - 2)
        _draw_dashed(draw, (max(x1 - 5, 0), max(y1 - 5, 0), x2, y2))
    records = proposal_records(instances, class_names)
    left_out = _draw_labels(draw, panel.size, boxes, records, styles)
    if left_out:
        subtitle += f"; {_plural(left_out, 'label')} left out"

    titled = Image.new("RGB", (panel.width, TITLE_HEIGHT + panel.height), WHITE)
    titled.paste(panel, (0, TITLE_HEIGHT))
    draw = ImageDraw.Draw(titled)
    draw.text((0, 2), title, INK, get_font(19, bold=True))
    draw.text((0, 27), subtitle, FAINT, get_font(14))
    if referent is not None:
        hit = hits(instances, referent)
        verdict, color = ("✓ object found", GREEN) if hit else ("✗ object missed", ORANGE)
        draw.text((panel.width, 2), verdict, color, get_font(19, bold=True), anchor="ra")
    return titled


def _draw_masks(scaled: np.ndarray, masks: np.ndarray, styles: Sequence[Style]) -> None:
    """Translucent masks, bool [n, H, W], with an outline on an RGB image of another size."""
    size = scaled.shape[1::-1]
    for mask, style in zip(masks, styles, strict=True):
        resized = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        inside = resized > 0
        scaled[inside] = 0.65 * scaled[inside] + 0.35 * np.array(style.color)
        contours, _ = cv2.findContours(resized, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(scaled, contours, -1, style.color, 1)


def _draw_box(draw: ImageDraw.ImageDraw, box: Box, style: Style) -> None:
    """A box with a light rim that keeps its line visible on any background."""
    x1, y1, x2, y2 = box
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(*WHITE, 2 * style.alpha // 3))
    draw.rectangle(box, outline=(*style.color, style.alpha), width=style.width)


def _draw_dashed(draw: ImageDraw.ImageDraw, box: Box) -> None:
    """A box as a black and white dashed line."""
    x1, y1, x2, y2 = box
    draw.rectangle(box, outline=(0, 0, 0, 255), width=3)
    for x in range(x1, x2, 14):
        for y in (y1 + 1, y2 - 1):
            draw.line((x, y, min(x + 7, x2), y), fill=WHITE, width=3)
    for y in range(y1, y2, 14):
        for x in (x1 + 1, x2 - 1):
            draw.line((x, y, x, min(y + 7, y2)), fill=WHITE, width=3)


def _draw_labels(
    draw: ImageDraw.ImageDraw,
    panel_size: tuple[int, int],
    boxes: Sequence[Box],
    records: Sequence[dict[str, Any]],
    styles: Sequence[Style],
) -> int:
    """Label the boxes in their order; returns how many are left without a label."""
    font = get_font(14)
    placed: list[Box] = []
    for i, (box, record) in enumerate(zip(boxes, records, strict=True)):
        if len(placed) == MAX_LABELS:
            break
        others = [other for j, other in enumerate(boxes) if j != i]
        name = truncate(record["class"], MAX_NAME)
        scores = [f"{key}={short_number(record[key])}" for key in "scr" if key in record]
        # Where all scores have no room, the first one may have.
        for text in (f"{name} {' '.join(scores)}", f"{name} {scores[0]}"):
            size = (round(font.getlength(text)) + 6, 18)
            spot = place_label(box, size, panel_size, placed, others)
            if spot is not None:
                placed.append(spot)
                opacity = 150 if styles[i] == DROPPED else 235
                draw.rectangle(spot, fill=(*styles[i].color, opacity))
                draw.text((spot[0] + 3, spot[1] + 1), text, WHITE, font)
                break
    return len(boxes) - len(placed)


def place_label(
    box: Box,
    size: tuple[int, int],
    panel_size: tuple[int, int],
    placed: Sequence[Box],
    others: Sequence[Box],
) -> Box | None:
    """The rectangle of a label of some size (width, height) at a box, all in pixels of the panel:
    inside the panel, over no label of `placed`, and over as little of the boxes in `others` as
    possible. None if there is none."""
    x1, y1, x2, y2 = box
    width, height = size
    columns, rows = (x1, x2 - width, (x1 + x2 - width) // 2), (y1, y2 - height)
    corners = [(x, y) for y in (y1 - height, y2) for x in columns]
    corners += [(x, y) for y in rows for x in (x2, x1 - width)]
    corners += [(x, y) for y in rows for x in columns]
    best, least = None, float("inf")
    for x, y in corners:
        x = min(max(x, 0), panel_size[0] - width - 1)
        y = min(max(y, 0), panel_size[1] - height - 1)
        spot = (x, y, x + width, y + height)
        covered = sum(_intersection(spot, other) for other in others)
        if covered < least and not any(_intersection(spot, other) for other in placed):
            best, least = spot, covered
    return best


def _intersection(one: Box, other: Box) -> int:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


# --- header and legend -------------------------------------------------------------------------


def _draw_header(
    query: str, words: Sequence[str], weights: np.ndarray | None, is_mean: bool, width: int
) -> Image.Image:
    """The words, darker with more attention, below what was typed if that differs from them."""
    room, font, small = width - 2 * MARGIN, get_font(24, bold=True), get_font(14)
    typed = " ".join(query.split())
    if not words:
        notes = ["The query has no words: every box counts as related to it."]
    elif weights is None:
        notes = ["Words of the query"]
    else:
        mean = ", mean over the kept boxes" if is_mean else ""
        notes = [f"Words of the query, darker where the model pays more attention{mean}"]
    if words and typed.lower().rstrip(" .?!") != " ".join(words):
        notes.insert(0, _fit_text(f"Query as typed: {typed}", small, room))
    x, y = MARGIN, MARGIN + 20 * len(notes) + 4
    # Tall enough for a row per word; cropped below.
    header = Image.new("RGB", (width, y + 56 * (len(words) + 1)), WHITE)
    draw = ImageDraw.Draw(header)
    for i, note in enumerate(notes):
        draw.text((MARGIN, MARGIN + 20 * i - 4), note, FAINT, small)
    for i, word in enumerate(words):
        word = _fit_text(word, font, room - 20)
        word_width = round(font.getlength(word)) + 20
        if x > MARGIN and x + word_width > MARGIN + room:
            x, y = MARGIN, y + 56
        share = 0.0 if weights is None else weights[i] / max(weights.max(), 1e-9)
        fill = tuple(round(p + share * (b - p)) for p, b in zip(PALE, BLUE, strict=True))
        draw.rounded_rectangle((x, y, x + word_width, y + 36), 7, fill=fill)
        middle = x + word_width // 2
        draw.text((middle, y + 18), word, WHITE if share > 0.5 else INK, font, anchor="mm")
        if weights is not None:
            draw.text((middle, y + 38), f"{100 * weights[i]:.0f} %", FAINT, small, anchor="ma")
        x += word_width + 6
    return header.crop((0, 0, width, y + (56 if words else 0) + MARGIN // 2))


def _draw_legend(width: int, with_referent: bool) -> Image.Image:
    """What the lines of the boxes mean."""
    entries = {
        "in both panels": IN_BOTH,
        "gained: only with the query": GAINED,
        "dropped: only without the query": DROPPED,
    }
    if with_referent:
        entries["the object meant (known for these scenes)"] = None
    legend = Image.new("RGB", (width, 38), WHITE)
    draw, font, x = ImageDraw.Draw(legend, "RGBA"), get_font(15), MARGIN
    for text, style in entries.items():
        box = (x + 6, 8, x + 34, 24)
        if style is None:
            _draw_dashed(draw, box)
        else:
            _draw_box(draw, box, style)
        draw.text((x + 42, 7), text, INK, font)
        x += round(font.getlength(text)) + 72
    return legend


# --- records -----------------------------------------------------------------------------------


def proposal_records(instances: Instances, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """For each proposal its `box` (xyxy in pixels), `class` (a number if it has no name), and its
    scores `s` (fused), `c` (class confidence) and `r` (relatedness); one of the detector alone has
    only `c`."""
    fields = {"c": "scores"}
    if instances.has("relatedness"):
        fields = {"s": "scores", "c": "cls_scores", "r": "relatedness"}
    columns = {key: instances.get(field).tolist() for key, field in fields.items()}
    boxes, classes = instances.pred_boxes.tensor.tolist(), instances.pred_classes.tolist()
    return [
        {"box": box, "class": class_names[c] if c < len(class_names) else str(c)}
        | {key: column[i] for key, column in columns.items()}
        for i, (box, c) in enumerate(zip(boxes, classes, strict=True))
    ]


def word_weights(attention: np.ndarray | None, num_words: int) -> tuple[np.ndarray | None, bool]:
    """Attention per word, float [num_words] or None, and whether it is a mean over the boxes."""
    if attention is None or num_words == 0 or len(attention) == 0:
        return None, False
    rows = np.atleast_2d(np.asarray(attention, dtype=np.float64))[:, :num_words]
    return rows.mean(axis=0), not np.allclose(rows, rows[:1], atol=1e-4)


def hits(instances: Instances, box: Sequence[float]) -> bool:
    """Whether a proposal hits `box` (xyxy in the same pixels)."""
    target = Boxes(torch.tensor([list(box)], device=instances.pred_boxes.device))
    return bool((pairwise_iou(instances.pred_boxes, target) > IOU_THRESHOLD).any())


@cache
def get_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which has the letters of most alphabets; it comes with matplotlib."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def short_number(value: float) -> str:
    """A score in [0, 1] with two digits: ".83", "1.0"."""
    text = f"{value:.2f}"
    return text[1:] if text.startswith("0") else text[:3]


def truncate(text: str, length: int) -> str:
    """The text in at most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _fit_text(text: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    """The text, shortened until it is at most `room` pixels wide."""
    while font.getlength(text) > room:
        text = text[: max(1, int(len(text) * 0.9)) - 1] + "…"
    return text


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
