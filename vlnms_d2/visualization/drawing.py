"""Colours, fonts, boxes: what the parts of a picture share."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
from PIL import ImageDraw, ImageFont

MARGIN = 12
"""Free space around what is drawn, in pixels."""
Color = tuple[int, int, int]
Box = tuple[int, int, int, int]
"""xyxy in pixels."""

# From Okabe and Ito's palette, which colour-blind people can tell apart.
BLUE, ORANGE, GREY = (0, 100, 180), (213, 94, 0), (110, 110, 110)
GREEN, INK, FAINT, WHITE = (0, 130, 90), (30, 30, 30), (105, 105, 105), (255, 255, 255)


class Style(NamedTuple):
    """How boxes of a kind are drawn.

    Attributes:
        color: RGB.
        width: of the line, in pixels.
        alpha: opacity, 0 to 255.
    """

    color: Color
    width: int
    alpha: int


IN_BOTH = Style(BLUE, 2, 255)
GAINED = Style(ORANGE, 4, 255)
DROPPED = Style(GREY, 1, 190)


def draw_box(draw: ImageDraw.ImageDraw, box: Box, style: Style) -> None:
    """A box in its style, with a light rim that keeps its line visible on any ground."""
    x1, y1, x2, y2 = box
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(*WHITE, 2 * style.alpha // 3))
    draw.rectangle(box, outline=(*style.color, style.alpha), width=style.width)


def draw_dashed(draw: ImageDraw.ImageDraw, box: Box) -> None:
    """A box as a black and white dashed line."""
    x1, y1, x2, y2 = box
    draw.rectangle((x1, y1, x2, y2), outline=(0, 0, 0, 255), width=3)
    for x in range(x1, x2, 14):
        for y in (y1 + 1, y2 - 1):
            draw.line((x, y, min(x + 7, x2), y), fill=WHITE, width=3)
    for y in range(y1, y2, 14):
        for x in (x1 + 1, x2 - 1):
            draw.line((x, y, x, min(y + 7, y2)), fill=WHITE, width=3)


def cut(text: str, length: int) -> str:
    """The text, cut to `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def shorten(text: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    """The text, cut to `room` pixels."""
    while font.getlength(text) > room:
        text = text[: max(1, int(len(text) * 0.9)) - 1] + "…"
    return text


@cache
def get_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which has the letters of most alphabets; it comes with matplotlib."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)
