"""Boxes with features for the tests of the second stages."""

from __future__ import annotations

import torch

from second_stages.store import ImageRegions

SIZE = (60, 80)  # height, width


def random_boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    """Float [count, 4], inside an image of `SIZE`."""
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([50.0, 30.0])
    return torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=generator) * 20], dim=1)


def make_regions(count: int, seed: int = 0, dim: int = 6, image_id: int = 1) -> ImageRegions:
    """Annotated boxes of an image, of three classes; the ids count from 10 * image_id."""
    generator = torch.Generator().manual_seed(seed)
    return ImageRegions(
        image_id,
        SIZE,
        random_boxes(count, generator),
        torch.randint(3, (count,), generator=generator),
        torch.ones(count),
        torch.randn(count, dim, generator=generator).half(),
        ids=torch.arange(count) + 10 * image_id,
    )
