"""Colours and patterns: from the words of an object to the colours of its sub-pixels."""

from __future__ import annotations

import numpy as np

from .raster import SUPERSAMPLE, Role, Stamp

_RGB = {
    "red": (205, 32, 38),
    "orange": (246, 130, 22),
    "yellow": (246, 216, 45),
    "green": (45, 150, 58),
    "blue": (42, 88, 208),
    "purple": (122, 50, 168),
    "pink": (247, 138, 184),
    "brown": (112, 66, 32),
    "white": (243, 243, 241),
    "black": (26, 26, 30),
}

MIN_CONTRAST = {
    "red": 0.66,
    "orange": 0.72,
    "yellow": 0.7,
    "green": 0.5,
    "blue": 0.48,
    "purple": 0.56,
    "pink": 0.65,
    "brown": 0.62,
    "white": 0.68,
    "black": 0.65,
}
"""Least opacity at which a colour word stays true over a grey surface: a paler orange would read
as brown, a paler white or black as grey."""

_FIXED = {
    Role.INK: (45, 43, 48),
    Role.METAL: (165, 168, 172),
    Role.WOOD: (118, 84, 56),
    Role.GLASS: (196, 216, 226),
    Role.PAPER: (238, 236, 226),
    Role.LEAF: (70, 118, 62),
    Role.BEAK: (226, 168, 60),
}


def role_colors(color: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colours of one object.

    Returns:
        float32 (number of roles, 3) BGR of each `Role`, and float32 (3,) BGR of the second tone
        of a pattern.
    """
    rgb = np.array(_RGB[color], float)
    if color in ("white", "black"):
        rgb = rgb + rng.uniform(-6, 6) + rng.uniform(-2, 2, 3)
    else:
        rgb = rgb * rng.uniform(0.93, 1.06) + rng.uniform(-9, 9, 3)
    tint = rgb + 0.74 * (255 - rgb)
    shade = rgb * 0.52
    if color == "white":
        dark, light, second = rgb * 0.68, rgb, rgb * 0.6
    elif color == "black":
        dark, light, second = rgb + 52, rgb + 75, rgb + 135
    elif color == "yellow":
        dark, light, second = shade * 1.25, tint, shade * 1.2
    else:
        dark, light = shade, rgb + 0.45 * (255 - rgb)
        second = tint if color == "brown" or rng.random() < 0.7 else shade * 0.8
    table = np.zeros((len(Role), 3))
    table[Role.BODY] = rgb
    table[Role.DARK] = dark
    table[Role.LIGHT] = light
    table[Role.OUTLINE] = dark * 0.75 if color != "black" else rgb * 0.6
    for role, fixed in _FIXED.items():
        table[role] = np.array(fixed) * rng.uniform(0.92, 1.05)
    to_bgr = slice(None, None, -1)
    return (
        np.clip(table, 0, 255)[:, to_bgr].astype(np.float32),
        np.clip(second, 0, 255)[to_bgr].astype(np.float32),
    )


def second_tone(
    pattern: str, stamp: Stamp, long_side: float, rng: np.random.Generator
) -> np.ndarray:
    """bool, shape of `stamp.labels`: where the pattern shows its second tone.

    The pattern turns with the icon, and its period is bounded below in pixels, so that it can be
    seen on a small object.
    """
    height, width = stamp.labels.shape
    if pattern == "plain":
        return np.zeros((height, width), bool)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = (x - width / 2) / SUPERSAMPLE, (y - height / 2) / SUPERSAMPLE
    slant = float(rng.choice([0, 45, 90, 135])) if pattern == "striped" else 0.0
    turn = np.float32(np.radians(stamp.angle + slant))
    u = x * np.cos(turn) + y * np.sin(turn)
    v = y * np.cos(turn) - x * np.sin(turn)
    period = float(np.clip(rng.uniform(0.23, 0.31) * long_side, 6.5, 16))
    phase = rng.uniform(0, period, 2)
    u, v = (u + phase[0]) / period, (v + phase[1]) / period
    if pattern == "striped":
        return u % 1 < 0.42
    if pattern == "dotted":
        row = np.floor(v)
        across = (u + 0.5 * (row % 2)) % 1 - 0.5
        return across**2 + (v % 1 - 0.5) ** 2 < 0.33**2
    if pattern == "checked":
        # Squares of 0.6 periods, or else they would be finer than the stripes.
        return (np.floor(u / 0.6) + np.floor(v / 0.6)) % 2 == 0
    raise ValueError(f"unknown pattern {pattern!r}")
