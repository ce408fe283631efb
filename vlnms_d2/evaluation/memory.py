"""How much memory queries take on top of the detector."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ..config import default_config
from .timing import describe_machine

IMAGE_SIZE = (480, 640)
QUERY = "the small red cup left of the chair near number"  # 11 words with the number behind it


def measure_memory(cfg: CfgNode, num_candidates: int, counts: Sequence[int]) -> dict[str, Any]:
    """By how much answering the queries of one image raises the peak of resident memory.

    That is encoding, scoring, box refinement and NMS, on the CPU, each number of queries in a
    fresh process. The weights are random: memory does not depend on them. Linux only.

    Args:
        cfg: of a VL-NMS head on a detector of any kind; its weights are not loaded.
        num_candidates: boxes of the image.
        counts: numbers of distinct queries.

    Returns:
        "rows", with the raise of the peak in MiB per count, and what they were measured on.

    Raises:
        ValueError: the detector does not give so many candidates.
    """
    return {
        "bound_mib": cfg.MODEL.VLNMS.CHUNK_MEMORY_MB,
        "candidates": num_candidates,
        "relatedness": cfg.MODEL.VLNMS.RELATEDNESS,
        "rows": peak_rows(_peak_of_answering, (cfg.dump(), num_candidates), counts),
        "machine": describe_machine(torch.device("cpu")),
    }


@torch.no_grad()
def _peak_of_answering(config_text: str, num_candidates: int, num_queries: int) -> float:
    cfg = default_config()
    cfg.merge_from_other_cfg(CfgNode.load_cfg(config_text))
    # Of a detector with random weights nothing is unlikely: it fills up the candidates.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.VLNMS.MAX_CANDIDATES = num_candidates
    model = build_model(cfg).eval()
    images = model.preprocess_image([{"image": torch.zeros(3, *IMAGE_SIZE)}])
    # Not from the backbone: with random weights a deep one gives infinities.
    height, width = images.tensor.shape[-2:]
    features = {
        name: torch.randn(1, spec.channels, height // spec.stride, width // spec.stride)
        for name, spec in model.backbone.output_shape().items()
    }
    proposals, _ = model.proposal_generator(images, features, None)
    candidates, _ = model.roi_heads.detect(features, proposals)
    if len(candidates[0]) != num_candidates:
        raise ValueError(
            f"the detector of this config gives {len(candidates[0])} candidates, expected "
            f"{num_candidates}; raise MODEL.RPN.POST_NMS_TOPK_TEST"
        )
    queries = [f"{QUERY} {i}" for i in range(num_queries)]
    # The first time, for the buffers that libraries make once.
    model.roi_heads.answer(candidates, images.image_sizes, [queries[:1]])
    return raise_of_peak(lambda: model.roi_heads.answer(candidates, images.image_sizes, [queries]))


def peak_rows(
    measure: Callable[..., float], args: tuple[Any, ...], counts: Sequence[int]
) -> list[dict[str, Any]]:
    """The raise of the peak per number of queries, each in a fresh process.

    Args:
        measure: of a module; from `args` and a count to the raise in MiB.
        args: can be pickled.
        counts: numbers of queries.
    """
    rows = []
    for count in counts:
        # What a process has freed it keeps, and it would hide the next peak.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            raised = pool.apply(measure, (*args, count))
        rows.append({"queries": count, "peak_mib": round(raised, 1)})
    return rows


def raise_of_peak(action: Callable[[], object]) -> float:
    """By how much an action raises the resident memory of this process at its peak, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak()
    action()
    return (_peak() - before) / 2**20


def _peak() -> int:
    """The most memory that was resident since the last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [kib] = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) * 1024
