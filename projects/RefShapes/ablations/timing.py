"""How much time queries take on top of the detector."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from benchmarks.base import describe_machine
from vlnms_d2.data import GroundingMapper

WARM_UP_IMAGES = 2


def measure_extra_time(cfg: CfgNode, num_images: int) -> dict[str, Any]:
    """Time the detector alone, with one expression, and with all expressions of an image.

    Each is timed in a pass of its own over the images: what a query leaves behind, such as
    threads that still wait for work, can slow the detector's next image. Masks are off, as in the
    evaluation of recall.

    Args:
        cfg: of a trained model; its weights are loaded.
        num_images: the first so many images of the last test set.

    Returns:
        Medians over the images, in ms, and what they were measured on.
    """
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    model.roi_heads.mask_on = False
    mapper = GroundingMapper(cfg, is_train=False)
    images = [mapper(d) for d in DatasetCatalog.get(cfg.DATASETS.TEST[-1])[:num_images]]
    # How many of its expressions an image is asked: None is all of them.
    alone, one, every = (1000 * _median_seconds(model, images, asked) for asked in (0, 1, None))
    return {
        "detector_ms": alone,
        "one_query_ms": one,
        "all_queries_ms": every,
        "queries_per_image": statistics.fmean(len(image["query"]) for image in images),
        "images": len(images),
        "dataset": cfg.DATASETS.TEST[-1],
        "machine": describe_machine(model.device),
    }


def _median_seconds(model: torch.nn.Module, images: list[dict], asked: int | None) -> float:
    """The median over the images, each with the first `asked` of its queries."""
    for image in images[:WARM_UP_IMAGES]:
        _time_image(model, image, asked)
    return statistics.median(_time_image(model, image, asked) for image in images)


@torch.no_grad()
def _time_image(model: torch.nn.Module, image: dict, asked: int | None) -> float:
    image_input = {key: image[key] for key in ("image", "height", "width")}
    if queries := image["query"][:asked]:
        image_input["query"] = queries
    start = time.perf_counter()
    model([image_input])
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start
