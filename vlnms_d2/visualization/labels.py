"""Labels of boxes: what they say, and where they have room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import ImageDraw

from .drawing import DROPPED, WHITE, Box, Style, cut, get_font
from .records import short_number

MAX_NAME = 20  # characters of a class name
MAX_LABELS = 20  # in a panel: more would hide the image


def label_texts(records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Per proposal a label, and a shorter one for where that has no room."""
    texts = []
    for record in records:
        name = cut(record["class"], MAX_NAME)
        scores = [f"{key}={short_number(record[key])}" for key in "scr" if key in record]
        texts.append((f"{name} {' '.join(scores)}", f"{name} {scores[0]}"))
    return texts


def draw_labels(
    draw: ImageDraw.ImageDraw,
    panel_size: tuple[int, int],
    boxes: Sequence[Box],
    labels: Sequence[tuple[str, str]],
    styles: Sequence[Style],
) -> int:
    """Label the boxes, the best ones first; returns how many have no label."""
    font = get_font(14)
    placed: list[Box] = []
    for i, (box, texts) in enumerate(zip(boxes, labels, strict=True)):
        if len(placed) == MAX_LABELS:
            break
        others = [other for j, other in enumerate(boxes) if j != i]
        for text in texts:
            size = (round(font.getlength(text)) + 6, 18)
            spot = place_label(box, size, panel_size, placed, others)
            if spot is not None:
                placed.append(spot)
                faint = styles[i] == DROPPED
                draw.rectangle(spot, fill=(*styles[i].color, 150 if faint else 235))
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
    """A rectangle for a label of `size` at `box`, all in pixels of the panel.

    It lies inside the panel and over no label of `placed`; of the possible ones, that which
    covers least of the `others`' boxes. None where there is none.
    """
    x1, y1, x2, y2 = box
    width, height = size
    columns, rows = (x1, x2 - width, (x1 + x2 - width) // 2), (y1 - height, y2, y1, y2 - height)
    corners = [(x, y) for y in rows[:2] for x in columns]
    corners += [(x, y) for y in rows[2:] for x in (x2, x1 - width)]
    corners += [(x, y) for y in rows[2:] for x in columns]
    best, least = None, float("inf")
    for x, y in corners:
        x = min(max(x, 0), panel_size[0] - width - 1)
        y = min(max(y, 0), panel_size[1] - height - 1)
        spot = (x, y, x + width, y + height)
        covered = sum(_overlap(spot, other) for other in others)
        if covered < least and not any(_overlap(spot, other) for other in placed):
            best, least = spot, covered
    return best


def _overlap(one: Box, other: Box) -> int:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)
