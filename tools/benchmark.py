#!/usr/bin/env python
"""Measure what queries cost.

    python tools/benchmark.py memory
    python tools/benchmark.py memory --config-file configs/refshapes/vlnms_fc_additive.yaml \\
        --queries 1 1000 --json memory.json --opts MODEL.VLNMS.CHUNK_MEMORY_MB 64

"memory": by how much answering queries about the candidates of one image (encoding, scoring,
box refinement, NMS) raises the peak of the process's resident memory, beside the bound
MODEL.VLNMS.CHUNK_MEMORY_MB. The weights are random: memory does not depend on them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from tabulate import tabulate

from vlnms_d2 import add_vlnms_config
from vlnms_d2.config import resolve_paths
from vlnms_d2.evaluation.timing import describe_machine
from vlnms_d2.file_io import write_json

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "refshapes" / "vlnms_trans_joint.yaml"
IMAGE_SIZE = (480, 640)
QUERY = "the small red cup left of the chair near number"  # 11 words with the number behind it


def setup(config_file: Path, opts: Sequence[str]) -> CfgNode:
    """The config of the command line, on the CPU and without weights."""
    cfg = get_cfg()
    add_vlnms_config(cfg)
    cfg.merge_from_file(str(config_file))
    cfg.merge_from_list(list(opts))
    resolve_paths(cfg, config_file)
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
    return cfg


# --- memory ------------------------------------------------------------------------------------


def measure_memory(cfg: CfgNode, num_candidates: int, counts: Sequence[int]) -> dict[str, Any]:
    """Peak memory per number of queries, each in a fresh process.

    Args:
        cfg: of a VL-NMS head on a detector of any kind.
        num_candidates: boxes of the image.
        counts: numbers of distinct queries.

    Returns:
        "rows", with the raise of the peak in MiB per count, and what they were measured on.
    """
    rows = []
    for count in counts:
        # What a process has freed it keeps, and it would hide the next peak.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(_peak_of_answering, (cfg.dump(), num_candidates, count))
        rows.append({"queries": count, "peak_mib": round(peak, 1)})
    return {
        "bound_mib": cfg.MODEL.VLNMS.CHUNK_MEMORY_MB,
        "candidates": num_candidates,
        "relatedness": cfg.MODEL.VLNMS.RELATEDNESS,
        "rows": rows,
        "machine": describe_machine(torch.device("cpu")),
    }


@torch.no_grad()
def _peak_of_answering(config_text: str, num_candidates: int, num_queries: int) -> float:
    cfg = get_cfg()
    add_vlnms_config(cfg)
    cfg.merge_from_other_cfg(CfgNode.load_cfg(config_text))
    # Of a detector with random weights nothing is unlikely: it fills up the candidates.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.VLNMS.MAX_CANDIDATES = num_candidates
    model = build_model(cfg).eval()
    images = model.preprocess_image([{"image": torch.rand(3, *IMAGE_SIZE) * 255}])
    features = model.backbone(images.tensor)
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
    before = _reset_peak()
    model.roi_heads.answer(candidates, images.image_sizes, [queries])
    return (_peak() - before) / 2**20


def _reset_peak() -> int:
    """Let the peak begin anew at what is resident now; returns that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """The most memory that was resident since the last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [kib] = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) * 1024


def show_memory(results: dict[str, Any]) -> str:
    """What `measure_memory` found, as text."""
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
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    description, _, epilog = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", choices=["memory"])
    add("--config-file", type=Path, default=DEFAULT_CONFIG, metavar="FILE")
    add("--candidates", type=int, default=300, metavar="N")
    add("--queries", type=int, nargs="+", default=[1, 100, 1000], metavar="Q")
    add("--json", type=Path, metavar="FILE", help="write the results there as well")
    rest = argparse.REMAINDER
    add("--opts", nargs=rest, default=[], metavar="KEY VALUE", help="to change the config; last")
    args = parser.parse_args(argv)
    try:
        cfg = setup(args.config_file, args.opts)
        results = measure_memory(cfg, args.candidates, args.queries)
    # Detectron2's configs raise any of these at a wrong key or value.
    except (AssertionError, KeyError, OSError, ValueError) as error:
        parser.error(f"{args.config_file}: {error}")
    print(show_memory(results))
    if args.json:
        write_json(args.json, {"memory": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
