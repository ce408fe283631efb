#!/usr/bin/env python
"""Check data sets and write what training on them needs: vocabulary, word vectors of its words,
pseudo ground truth, statistics.

    python tools/prepare_data.py --datasets refcoco_unc_train refcoco_unc_val
    python tools/prepare_data.py --datasets refcoco_unc_train --word-vectors glove.840B.300d.txt

    # the ids of the images that a detector must not be trained on
    python tools/prepare_data.py --datasets coco_2014_trainval_without_refer

    # WSPG: boxes of a detector in place of the annotated ones
    python tools/prepare_data.py --datasets refcoco_unc_train \\
        --detections results.json --categories instances.json

Training finds the files there; with --out, set `MODEL.VLNMS.PSEUDO_GT.DIR OUT` in the config.
Existing files are not written again, so the same command resumes after interruption. Put training
sets first: the others are compared with their vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))  # if other code runs this file

from import_option import add_import_option


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--datasets", nargs="+", required=True, metavar="NAME")
    add("--out", type=Path, help="default: the folder vlnms_d2 under $DETECTRON2_DATASETS")
    add("--pipeline", default="", help="spaCy pipeline; default: vlnms_d2's own")
    add("--word-vectors", default="", help="GloVe-format file; default: MiniLM")
    # The defaults of gamma and of the score are in preparation.py.
    gammas = "minimum cosine; default: 0.65 for MiniLM, 0.4 for a file"
    add("--gamma", type=float, help=gammas)
    add("--vocab-min-count", type=int, default=2, metavar="N")
    add("--detections", default="", help="COCO results of a detector, for WSPG")
    add("--categories", help="COCO file with the detector's categories, for WSPG")
    add("--min-score", type=float, help="of detections, for WSPG; default: 0.1")
    add("--processes", type=int, default=1, metavar="P", help="that find nouns")
    add("--redo", action="store_true", help="write existing files again")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = make_parser()
    add_import_option(parser)
    args = parser.parse_args(argv)
    if bool(args.detections) != bool(args.categories):
        parser.error("--detections and --categories go together")
    if args.processes < 1:
        parser.error("--processes must be at least 1")
    for name, low in (("gamma", -1), ("min_score", 0)):
        value = getattr(args, name)
        if value is not None and not low <= value <= 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected {low} to 1")
    if args.vocab_min_count < 1:
        parser.error(f"--vocab-min-count is {args.vocab_min_count}, expected at least 1")

    from detectron2.data import DatasetCatalog
    from tqdm import tqdm

    from preparation import GAMMA_GLOVE, GAMMA_MINILM, Preparation, Settings, read_detections
    from vlnms_d2.data.pseudo_gt import prepared_folder
    from vlnms_d2.language.word_vectors import load_word_vectors

    unknown = [name for name in args.datasets if name not in DatasetCatalog]
    if unknown:
        known = ", ".join(sorted(n for n in DatasetCatalog if n.endswith("_train")))
        parser.error(f"no such data set: {', '.join(unknown)}; training sets are {known}")
    gamma, min_score = args.gamma, args.min_score
    if gamma is None:
        gamma = GAMMA_GLOVE if args.word_vectors else GAMMA_MINILM
    settings = Settings(
        pipeline=args.pipeline,
        word_vectors=args.word_vectors,
        gamma=gamma,
        vocab_min_count=args.vocab_min_count,
        detections=args.detections,
        min_score=Settings.min_score if min_score is None else min_score,
    )
    try:
        detected = None
        if args.detections:
            detected = read_detections(args.detections, args.categories, settings.min_score)
        preparation = Preparation(
            prepared_folder(args.out or ""),
            settings,
            lambda: load_word_vectors(args.word_vectors),
            detected,
            redo=args.redo,
            report=tqdm.write,
            processes=args.processes,
        )
        for name in tqdm(args.datasets, unit="data set", disable=None):
            for key, value in preparation.prepare(name).items():
                shown = f"{value:.3f}" if isinstance(value, float) else value
                tqdm.write(f"  {key.replace('_', ' ')}: {shown}")
    except (FileNotFoundError, ValueError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
