"""Paint a layout: shapes over a background, then the light, noise and blur of a camera."""

from __future__ import annotations

import cv2
import numpy as np

from vlnms_d2.data.datasets.refshapes import SPLITS

from .backgrounds import fractal_noise, paint_background
from .layout import PlacedShape, sample_layout, visible_masks
from .masks import mask_box, mask_polygons
from .palette import role_colors, second_tone
from .raster import Role
from .scene import Scene, SceneObject


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
