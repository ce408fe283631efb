"""Textured backgrounds that look like an out-of-focus photograph of a surface."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

# RGB base tones. Medium lightness and low saturation, so that every colour word of an object,
# 'white' and 'black' included, stands out from the surface under it.
_NEUTRAL = ((150, 145, 135), (120, 122, 125), (165, 155, 140), (130, 120, 115), (140, 150, 155))
_GREEN = ((95, 118, 80), (112, 128, 90), (88, 108, 84), (120, 130, 105))
_BROWN = ((150, 125, 100), (135, 112, 92), (165, 142, 115), (120, 102, 90))
_MUTED = ((120, 130, 150), (145, 125, 140), (155, 145, 120), (115, 140, 140), (150, 130, 125))


def fractal_noise(
    rng: np.random.Generator,
    height: int,
    width: int,
    cell: float = 64,
    octaves: int = 5,
    persistence: float = 0.55,
    stretch: tuple[float, float] = (1, 1),
) -> np.ndarray:
    """Sum of smooth random fields.

    Args:
        cell: spacing in pixels of the coarsest field's random values; each octave halves it.
        persistence: amplitude of an octave relative to the one before.
        stretch: factors of the spacing down and across, for grain with a direction.

    Returns:
        float32 (height, width), mean about 0, standard deviation 1.
    """
    total = np.zeros((height, width), np.float32)
    amplitude = 1.0
    for _ in range(octaves):
        rows = min(height, max(2, round(height / (cell * stretch[0])) + 1))
        cols = min(width, max(2, round(width / (cell * stretch[1])) + 1))
        grid = rng.standard_normal((rows, cols), dtype=np.float32)
        total += amplitude * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        amplitude *= persistence
        cell = max(1.0, cell / 2)
    return (total - total.mean()) / (total.std() + 1e-6)


def _tone(rng: np.random.Generator, *palettes: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """float32 (3,) BGR: a jittered tone of one of the palettes."""
    palette = palettes[int(rng.integers(len(palettes)))]
    rgb = np.array(palette[int(rng.integers(len(palette)))], np.float32)
    return (rgb * rng.uniform(0.85, 1.15) + rng.uniform(-6, 6, 3))[::-1].astype(np.float32)


def _textured(tone: np.ndarray, *fields: np.ndarray) -> np.ndarray:
    """float32 (H, W, 3): a tone scaled by 1 + the sum of (H, W) fields."""
    return tone * (1 + sum(fields))[..., None]


def _wall(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    image = _textured(
        _tone(rng, _NEUTRAL, _BROWN, _MUTED),
        0.07 * fractal_noise(rng, height, width, 90),
        0.04 * fractal_noise(rng, height, width, 4, 2),
    )
    if rng.random() < 0.5:
        course, joint = int(rng.integers(18, 34)), float(rng.uniform(0.78, 1.18))
        brick, phase = course * 2, int(rng.integers(course))
        for row, y in enumerate(range(-phase, height, course)):
            image[max(0, y) : max(0, y + 2)] *= joint
            for x in range((row % 2) * course, width, brick):
                image[max(0, y) : max(0, y + course), x : x + 2] *= joint
    return image


def _grass(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    image = _textured(
        _tone(rng, _GREEN),
        0.10 * fractal_noise(rng, height, width, 70),
        0.12 * fractal_noise(rng, height, width, 6, 2, stretch=(2.5, 0.6)),
    )
    blades = int(height * width / 250)
    starts = rng.uniform(0, 1, (blades, 2)) * (width, height)
    leans = rng.normal(0, 3, blades)
    lengths = rng.uniform(5, 14, blades)
    tones = rng.uniform(0.7, 1.35, blades)
    for (x, y), lean, length, tone in zip(starts, leans, lengths, tones, strict=True):
        at = image[min(height - 1, int(y)), min(width - 1, int(x))]
        ends = (round(x), round(y)), (round(x + lean), round(y - length))
        cv2.line(image, *ends, (at * tone).tolist(), 1, cv2.LINE_AA)
    return image


def _fabric(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    period = rng.uniform(3, 7)
    turn = rng.uniform(-0.4, 0.4)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    weave = np.sin(2 * np.pi * u / period) * np.sin(2 * np.pi * v / period)
    folds = np.sin(u / rng.uniform(25, 60) + fractal_noise(rng, height, width, 120, 2))
    return _textured(
        _tone(rng, _MUTED, _NEUTRAL),
        (0.07 * weave + rng.uniform(0.03, 0.1) * folds).astype(np.float32),
        0.05 * fractal_noise(rng, height, width, 30),
    )


def _wood(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    across = rng.random() < 0.5
    grain = fractal_noise(rng, height, width, 40, 4, stretch=(0.3, 6) if across else (6, 0.3))
    rings = np.sin(3 * grain + 2 * fractal_noise(rng, height, width, 150, 2))
    image = _textured(_tone(rng, _BROWN), 0.09 * grain, 0.06 * rings)
    plank = int(rng.integers(40, 90))
    for at in range(int(rng.integers(plank)), height if across else width, plank):
        seam = (slice(at, at + 2), slice(None)) if across else (slice(None), slice(at, at + 2))
        image[seam] *= 0.7
    return image


def _bokeh(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Soft discs of light and shade over a gradient."""
    image = _horizon(rng, height, width)
    for _ in range(int(rng.integers(8, 25))):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        layer = image.copy()
        tone = _tone(rng, _GREEN, _MUTED, _BROWN, _NEUTRAL) * rng.uniform(0.7, 1.3)
        cv2.circle(layer, centre, int(rng.integers(8, 45)), tone.tolist(), -1, cv2.LINE_AA)
        image = cv2.addWeighted(image, 0.5, layer, 0.5, 0)
    return cv2.GaussianBlur(image, (0, 0), float(rng.uniform(1.5, 5)))


def _horizon(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A far surface above, a near and rougher one below."""
    above, below = _tone(rng, _MUTED, _NEUTRAL), _tone(rng, _GREEN, _BROWN, _NEUTRAL)
    line = rng.uniform(0.2, 0.6) * height + 6 * fractal_noise(rng, 1, width, 80, 3)
    y = np.arange(height, dtype=np.float32)[:, None]
    softness = rng.uniform(0.7, 8)
    share = np.clip((y - line) / (4 * softness) + 0.5, 0, 1)[..., None].astype(np.float32)
    far = _textured(above, 0.05 * fractal_noise(rng, height, width, 100, 4, stretch=(0.5, 2)))
    near = _textured(below, 0.12 * fractal_noise(rng, height, width, 30, stretch=(0.5, 1.5)))
    return far * (1 - share) + near * share


def _pebbles(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Overlapping small stones or leaves."""
    tone = _tone(rng, _NEUTRAL, _BROWN, _GREEN)
    image = _textured(tone, 0.1 * fractal_noise(rng, height, width, 60))
    reach = rng.uniform(3, 9)
    count = int(height * width / (reach * reach * 5))
    centres = (rng.uniform(0, 1, (count, 2)) * (width, height)).astype(int).tolist()
    axes = np.maximum(1, reach * rng.uniform(0.4, 1.2, (count, 2))).astype(int).tolist()
    turns = rng.uniform(0, 180, count)
    tones = tone * rng.normal(1, 0.13, (count, 1)) + rng.normal(0, 4, (count, 3))
    for centre, axis, turn, shade in zip(centres, axes, turns, tones, strict=True):
        cv2.ellipse(image, centre, axis, float(turn), 0, 360, shade.tolist(), -1, cv2.LINE_AA)
    return _textured(np.float32(1), 0.05 * fractal_noise(rng, height, width, 8, 3)) * image


BACKGROUNDS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "wall": _wall,
    "grass": _grass,
    "fabric": _fabric,
    "wood": _wood,
    "bokeh": _bokeh,
    "horizon": _horizon,
    "pebbles": _pebbles,
}


def paint_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float32 (height, width, 3) BGR in [0, 255]: a random surface, at times out of focus."""
    kinds = tuple(BACKGROUNDS)
    image = BACKGROUNDS[kinds[int(rng.integers(len(kinds)))]](rng, height, width)
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.7, 2.5)))
    return np.clip(image, 0, 255).astype(np.float32)
