"""Memory needed to answer queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate

from vlnms_d2.config import default_config

from .base import Benchmark, Options, describe_machine, peak_increase, peak_rows, show_machine
from .detector import IMAGE_SIZE, made_up_queries

CONFIG = Path(__file__).parents[2] / "configs" / "refshapes" / "vlnms_trans_joint.yaml"
QUERIES = (1, 100, 1000)


class Memory(Benchmark):
    """Increase of peak resident memory for answering the queries of one image.

    Includes encoding, scoring, box refinement and NMS, on the CPU, with a fresh process for each
    number of queries. The weights are random, as memory does not depend on them. Linux only.
    """

    def measure(self, options: Options) -> dict[str, Any]:
        """See `Benchmark.measure`; "rows" have the increase in MiB."""
        if options.device != "cpu":
            raise ValueError("memory is measured on the CPU only; leave --device out")
        cfg = options.load_config(CONFIG)
        args = (cfg.dump(), options.candidates)
        return {
            "bound_mib": cfg.MODEL.VLNMS.CHUNK_MEMORY_MB,
            "candidates": options.candidates,
            "relatedness": cfg.MODEL.VLNMS.RELATEDNESS,
            "rows": peak_rows(_peak_of_answering, args, options.queries or QUERIES),
            "machine": describe_machine(options.torch_device),
        }

    def show(self, results: dict[str, Any]) -> str:
        """See `Benchmark.show`."""
        bound, rows = results["bound_mib"], results["rows"]
        return (
            f"{results['relatedness']}, {results['candidates']} candidates, "
            f"MODEL.VLNMS.CHUNK_MEMORY_MB {bound}:\n"
            + tabulate(
                [[row["queries"], row["peak_mib"], row["peak_mib"] / bound] for row in rows],
                headers=["queries", "peak (MiB)", "of the bound"],
                tablefmt="pipe",
                floatfmt=("", ".1f", ".2f"),
            )
            + f"\n{show_machine(results)}"
        )


@torch.no_grad()
def _peak_of_answering(config_text: str, num_candidates: int, num_queries: int) -> float:
    cfg = default_config()
    cfg.merge_from_other_cfg(CfgNode.load_cfg(config_text))
    # A detector with random weights has no low scores, so that all candidates are used.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.VLNMS.MAX_CANDIDATES = num_candidates
    model = build_model(cfg).eval()
    images = model.preprocess_image([{"image": torch.zeros(3, *IMAGE_SIZE)}])
    # Not from the backbone, whose features are infinite with random weights.
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
    queries = made_up_queries(num_queries)
    # Warm-up, for buffers that libraries allocate once.
    model.roi_heads.score_queries(candidates, images.image_sizes, [queries[:1]])
    return peak_increase(
        lambda: model.roi_heads.score_queries(candidates, images.image_sizes, [queries])
    )
