"""The query above the panels and the legend below them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .drawing import (
    BLUE,
    DROPPED,
    FAINT,
    GAINED,
    IN_BOTH,
    INK,
    MARGIN,
    WHITE,
    Style,
    draw_box,
    draw_dashed,
    get_font,
    shorten,
)

PALE = (226, 238, 248)  # behind a word without attention


def draw_header(
    query: str, words: Sequence[str], weights: np.ndarray | None, is_mean: bool, width: int
) -> Image.Image:
    """The words, darker the more attention they get, under what was typed if that differs."""
    room = width - 2 * MARGIN
    font, small = get_font(24, bold=True), get_font(14)
    typed, read = " ".join(query.split()), " ".join(words)
    words = [shorten(word, font, room - 20) for word in words]
    spots = flow([round(font.getlength(word)) + 20 for word in words], room, gap=6)
    notes = [_note(words, weights, is_mean)]
    if words and typed.lower().rstrip(" .?!") != read:
        notes.insert(0, shorten(f"Query as typed: {typed}", small, room))
    rows = spots[-1][1] + 1 if spots else 0
    top = MARGIN + 20 * len(notes) + 4
    header = Image.new("RGB", (width, top + 56 * rows + MARGIN // 2), WHITE)
    draw = ImageDraw.Draw(header)
    for i, note in enumerate(notes):
        draw.text((MARGIN, MARGIN + 20 * i - 4), note, FAINT, small)
    for i, (word, (x, row)) in enumerate(zip(words, spots, strict=True)):
        share = 0.0 if weights is None else weights[i] / max(weights.max(), 1e-9)
        spot = (MARGIN + x, top + 56 * row, MARGIN + x + round(font.getlength(word)) + 20)
        fill = tuple(round(p + share * (b - p)) for p, b in zip(PALE, BLUE, strict=True))
        draw.rounded_rectangle((*spot, spot[1] + 36), 7, fill=fill)
        ink, middle = WHITE if share > 0.5 else INK, (spot[0] + spot[2]) // 2
        draw.text((middle, spot[1] + 18), word, ink, font, anchor="mm")
        if weights is not None:
            percent = f"{100 * weights[i]:.0f} %"
            draw.text((middle, spot[1] + 38), percent, FAINT, small, anchor="ma")
    return header


def _note(words: Sequence[str], weights: np.ndarray | None, is_mean: bool) -> str:
    if not words:
        return "The query has no words: every box counts as related to it."
    if weights is None:
        return "Words of the query"
    mean = ", mean over the kept boxes" if is_mean else ""
    return f"Words of the query, the darker the more attention the model pays{mean}"


def draw_legend(width: int, with_referent: bool) -> Image.Image:
    """What the lines of the boxes mean."""
    entries: list[tuple[Style | None, str]] = [
        (IN_BOTH, "in both panels"),
        (GAINED, "gained: only with the query"),
        (DROPPED, "dropped: only without the query"),
    ]
    if with_referent:
        entries.append((None, "the object meant (known for these scenes)"))
    font = get_font(15)
    widths = [48 + round(font.getlength(text)) for _, text in entries]
    spots = flow(widths, width - 2 * MARGIN, gap=24)
    legend = Image.new("RGB", (width, 30 * (spots[-1][1] + 1) + 8), WHITE)
    draw = ImageDraw.Draw(legend, "RGBA")
    for (style, text), (x, row) in zip(entries, spots, strict=True):
        box = (MARGIN + x + 6, 30 * row + 8, MARGIN + x + 34, 30 * row + 24)
        if style is None:
            draw_dashed(draw, box)
        else:
            draw_box(draw, box, style)
        draw.text((box[2] + 8, 30 * row + 7), text, INK, font)
    return legend


def flow(widths: Sequence[int], room: int, gap: int) -> list[tuple[int, int]]:
    """(x, row) of items set one after the other, a new row where `room` pixels are full."""
    spots, x, row = [], 0, 0
    for width in widths:
        if x and x + width > room:
            x, row = 0, row + 1
        spots.append((x, row))
        x += width + gap
    return spots
