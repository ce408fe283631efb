"""Random scenes for tests, made without painting anything."""

from __future__ import annotations

from random import Random

from refshapes.scene import COLORS, PATTERNS, SIZES, Scene, SceneObject
from vlnms_d2.data.datasets.refshapes import CATEGORIES

WIDTH, HEIGHT = 400, 300
SIDE = {"small": 32, "medium": 55, "large": 90}  # pixels


def random_scene(seed: int, image_id: int = 1, crowd: int | None = None) -> Scene:
    """A scene of 5 to 12 objects (or `crowd`), of few categories so that they must be told
    apart; some cover others."""
    rng = Random(seed)
    categories = rng.sample(CATEGORIES, rng.randint(3, 7))
    objects = []
    for number in range(crowd or rng.randint(5, 12)):
        size = rng.choice(SIZES)
        width, height = (SIDE[size] * rng.uniform(0.9, 1.1) for _ in range(2))
        x, y = rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height)
        objects.append(
            SceneObject(
                id=image_id * 100 + number,
                category=rng.choice(categories),
                color=rng.choice(COLORS),
                pattern=rng.choice(PATTERNS),
                size=size,
                box=(x, y, x + width, y + height),
                visible=rng.choice((1.0, 1.0, 1.0, 0.8, 0.6, 0.4)),
                segmentation=((x, y, x + width, y, x + width, y + height, x, y + height),),
                area=width * height,
            )
        )
    return Scene(image_id, rng.choice(("train", "val", "testA")), WIDTH, HEIGHT, tuple(objects))
