"""Painting of a layout: shapes over a background, then the light, noise and blur of a camera."""

from __future__ import annotations

import cv2
import numpy as np

from vlnms_d2.data.datasets.refshapes import SPLITS

from .backgrounds import fractal_noise, paint_background
from .layout import PlacedShape, sample_layout, visible_masks
from .raster import SUPERSAMPLE, Role, Stamp
from .scene import Scene, SceneObject

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
_FIXED = {
    Role.INK: (45, 43, 48),
    Role.METAL: (165, 168, 172),
    Role.WOOD: (118, 84, 56),
    Role.GLASS: (196, 216, 226),
    Role.PAPER: (238, 236, 226),
    Role.LEAF: (70, 118, 62),
    Role.BEAK: (226, 168, 60),
}

_ZOOM = 4  # an outline is traced at this scale, to pass along pixel edges and not pixel centres
_TOLERANCE = 0.5  # pixels a simplified outline may lie off the exact one
_LEAST_AREA = 3.0  # square pixels; specks and holes below are dropped


def make_scene(
    seed: int, split: str, index: int, image_id: int, width: int, height: int
) -> tuple[np.ndarray, Scene]:
    """The image at position `index` of a split; depends on its arguments alone.

    Returns:
        uint8 (height, width, 3) BGR image, and its scene with objects numbered from 1.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    layout = sample_layout(rng, split, width, height)
    image, objects = paint(layout, rng, width, height)
    return image, Scene(image_id, split, width, height, objects)


def paint(
    layout: list[PlacedShape], rng: np.random.Generator, width: int, height: int
) -> tuple[np.ndarray, tuple[SceneObject, ...]]:
    """Paint the shapes in their order.

    Returns:
        uint8 (height, width, 3) BGR image, and its objects numbered from 1, first painted first.
    """
    image = paint_background(rng, height, width)
    for shape in layout:
        _paint_shape(image, shape, rng)
    image = _photograph(image, rng)
    objects = tuple(
        _describe(number, shape, mask)
        for number, (shape, mask) in enumerate(visible_masks(layout, width, height), 1)
    )
    return image, objects


def _describe(number: int, shape: PlacedShape, mask: np.ndarray) -> SceneObject:
    area = int(mask.sum())
    return SceneObject(
        id=number,
        category=shape.category,
        color=shape.color,
        pattern=shape.pattern,
        size=shape.size,
        box=mask_box(mask),
        visible=round(area / int(shape.stamp.mask.sum()), 4),
        segmentation=mask_polygons(mask),
        area=float(area),
    )


def _paint_shape(image: np.ndarray, shape: PlacedShape, rng: np.random.Generator) -> None:
    """Paint one shape over a float32 (H, W, 3) image, in place."""
    color, alpha = _render(shape, rng)
    # The blur spreads the shape beyond its stamp: pad by as much as it can reach.
    pad = max(1, round(3 * shape.blur) + 1)
    color = cv2.copyMakeBorder(color, pad, pad, pad, pad, cv2.BORDER_CONSTANT)
    alpha = cv2.copyMakeBorder(alpha, pad, pad, pad, pad, cv2.BORDER_CONSTANT)
    if shape.blur > 0.3:
        color = cv2.GaussianBlur(color, (0, 0), shape.blur)
        alpha = cv2.GaussianBlur(alpha, (0, 0), shape.blur)

    if shape.shadow:
        shift = max(2, round(0.07 * shape.long_side))
        soft = cv2.GaussianBlur(alpha, (0, 0), 0.5 + 0.03 * shape.long_side)
        area, part = _overlap(image, shape.left - pad + shift, shape.top - pad + shift, soft)
        area *= 1 - shape.shadow * part[..., None]

    surface = image[shape.window][shape.stamp.mask].mean(0)
    # Paling toward the surface's full colour could turn the hue; toward its half-grey it does not.
    surface = (surface + surface.mean()) / 2
    layer = np.dstack(
        [shape.contrast * color + (1 - shape.contrast) * alpha[..., None] * surface, alpha]
    )
    area, part = _overlap(image, shape.left - pad, shape.top - pad, layer)
    area *= 1 - part[..., 3:]
    area += part[..., :3]


def _render(shape: PlacedShape, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """float32 (h, w, 3) BGR colours times alpha, and float32 (h, w) alpha, of a shape's stamp."""
    stamp = shape.stamp
    table, second = role_colors(shape.color, rng)
    color = table[stamp.labels]
    marked = second_tone(shape.pattern, stamp, shape.long_side, rng) & (stamp.labels == Role.BODY)
    color[marked] = second
    rows, cols = stamp.mask.shape
    color = cv2.resize(color, (cols, rows), interpolation=cv2.INTER_AREA)
    # Light from above left, and a little grain, as on a real surface.
    slope = np.linspace(1, -1, rows)[:, None] + np.linspace(1, -1, cols)[None]
    grain = rng.standard_normal((rows, cols), dtype=np.float32)
    gain = 1 + rng.uniform(0.01, 0.06) * slope + 0.03 * cv2.GaussianBlur(grain, (0, 0), 0.8)
    return np.clip(color * gain[..., None], 0, 255).astype(np.float32), stamp.alpha


def _overlap(
    image: np.ndarray, left: int, top: int, patch: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Views of the image and of a patch laid at (left, top), where both exist."""
    height, width = image.shape[:2]
    x1, y1 = max(0, left), max(0, top)
    x2, y2 = min(width, left + patch.shape[1]), min(height, top + patch.shape[0])
    return image[y1:y2, x1:x2], patch[y1 - top : y2 - top, x1 - left : x2 - left]


def _photograph(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 (H, W, 3): a float32 image under uneven light, blurred, noisy and compressed."""
    height, width = image.shape[:2]
    turn = rng.uniform(0, 2 * np.pi)
    across = np.linspace(-1, 1, width, dtype=np.float32)[None] * np.cos(turn)
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * np.sin(turn)
    light = rng.uniform(0.92, 1.03) + rng.uniform(0, 0.1) * (across + down)
    light = light + 0.03 * fractal_noise(rng, height, width, 150, 2)
    image = image * light[..., None] * rng.uniform(0.97, 1.03, 3)
    if rng.random() < 0.35:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 0.9)))
    noise = rng.standard_normal((height, width, 3), dtype=np.float32)
    image = image + noise * rng.uniform(1.5, 9)
    flat = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    quality = int(rng.integers(45, 95))
    _, packed = cv2.imencode(".jpg", flat, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(packed, cv2.IMREAD_COLOR)


# --- colors and patterns -----------------------------------------------------------------------


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

    The pattern turns with the icon, and its period is bounded below in pixels, so that it
    is visible on a small object.
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


# --- boxes and polygons ------------------------------------------------------------------------


def mask_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """(x1, y1, x2, y2) in pixels around the set pixels of a bool (H, W) mask, x2, y2 exclusive."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise ValueError("the mask is empty")
    return float(cols[0]), float(rows[0]), float(cols[-1] + 1), float(rows[-1] + 1)


def mask_polygons(mask: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """COCO polygons, each [x1, y1, x2, y2, ...] in pixels, of a bool (H, W) mask.

    COCO polygons cannot hold holes, so a region with a hole is cut through it into two.
    """
    x1, y1, x2, y2 = map(int, mask_box(mask))
    polygons: list[tuple[float, ...]] = []
    _trace(np.ascontiguousarray(mask[y1:y2, x1:x2]).astype(np.uint8), x1, y1, polygons)
    return tuple(polygons)


def _trace(mask: np.ndarray, left: int, top: int, polygons: list[tuple[float, ...]]) -> None:
    # A border of zeros keeps outlines at the crop's edge intact.
    zoomed = np.kron(np.pad(mask, 1), np.ones((_ZOOM, _ZOOM), np.uint8))
    outlines, hierarchy = cv2.findContours(zoomed, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    holes = [
        outline
        for outline, (_, _, _, parent) in zip(
            outlines, hierarchy[0] if len(outlines) else (), strict=True
        )
        if parent >= 0 and cv2.contourArea(outline) >= _LEAST_AREA * _ZOOM**2
    ]
    if holes:
        x, _, width, _ = cv2.boundingRect(holes[0])
        cut = int(np.clip(round((x + width / 2) / _ZOOM) - 1, 1, mask.shape[1] - 1))
        _trace(mask[:, :cut], left, top, polygons)
        _trace(mask[:, cut:], left + cut, top, polygons)
        return
    for outline, (_, _, _, parent) in zip(
        outlines, hierarchy[0] if len(outlines) else (), strict=True
    ):
        if parent >= 0:
            continue
        simple = cv2.approxPolyDP(outline, _TOLERANCE * _ZOOM, True)[:, 0]
        if len(simple) < 3 or cv2.contourArea(outline) < _LEAST_AREA * _ZOOM**2:
            continue
        # Outlines run through the centres of the zoomed pixels on the border.
        points = (simple + 0.5) / _ZOOM - 1 + (left, top)
        polygons.append(tuple(np.round(points, 2).ravel().tolist()))
