#!/usr/bin/env python
"""Check data sets and make what training on them needs: vocabulary, word vectors of its words,
pseudo ground truth, statistics.

    python tools/prepare_data.py --datasets refcoco_unc_train refcoco_unc_val
    python tools/prepare_data.py --datasets refcoco_unc_train --word-vectors glove.840B.300d.txt

    # WSPG: boxes of a detector in place of the annotated ones
    python tools/prepare_data.py --datasets refcoco_unc_train \\
        --detections results.json --categories instances.json

Training finds it there; with --out, give the configs `MODEL.VLNMS.PSEUDO_GT.DIR OUT`. What is
there already is not made again, so the same command goes on where it was stopped. Put training
sets first: the others are compared with their vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog
from tqdm import tqdm

from vlnms_d2.data.detections import read_detections
from vlnms_d2.data.pseudo_gt import prepared_folder
from vlnms_d2.engine.command_line import make_parser
from vlnms_d2.engine.preparation import GAMMA_GLOVE, GAMMA_MINILM, Preparation, Settings
from vlnms_d2.language.word_vectors import load_word_vectors


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--datasets", nargs="+", required=True, metavar="NAME")
    parser.add_argument(
        "--out", type=Path, help="default: the folder vlnms_d2 under $DETECTRON2_DATASETS"
    )
    parser.add_argument("--pipeline", default="", help="spaCy pipeline; default: vlnms_d2's own")
    parser.add_argument("--word-vectors", default="", help="GloVe-format file; default: MiniLM")
    parser.add_argument(
        "--gamma",
        type=float,
        help=f"least cosine; default: {GAMMA_MINILM} for MiniLM, {GAMMA_GLOVE} for a file",
    )
    parser.add_argument("--vocab-min-count", type=int, default=2, metavar="N")
    parser.add_argument("--detections", default="", help="COCO results of a detector, for WSPG")
    parser.add_argument("--categories", help="COCO file with the detector's categories, for WSPG")
    parser.add_argument(
        "--min-score",
        type=float,
        default=Settings.min_score,
        help="of detections, for WSPG (default: %(default)s)",
    )
    parser.add_argument("--processes", type=int, default=1, metavar="P", help="that find nouns")
    parser.add_argument("--redo", action="store_true", help="make again what is there")
    args = parser.parse_args(argv)
    if bool(args.detections) != bool(args.categories):
        parser.error("--detections and --categories go together")
    if args.processes < 1:
        parser.error("--processes must be at least 1")
    unknown = [name for name in args.datasets if name not in DatasetCatalog]
    if unknown:
        known = ", ".join(sorted(n for n in DatasetCatalog if n.endswith("_train")))
        parser.error(f"no such data set: {', '.join(unknown)}; training sets are {known}")
    gamma = args.gamma
    if gamma is None:
        gamma = GAMMA_GLOVE if args.word_vectors else GAMMA_MINILM
    settings = Settings(
        pipeline=args.pipeline,
        word_vectors=args.word_vectors,
        gamma=gamma,
        vocab_min_count=args.vocab_min_count,
        detections=args.detections,
        min_score=args.min_score,
    )
    try:
        detected = None
        if args.detections:
            detected = read_detections(args.detections, args.categories, args.min_score)
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
    sys.exit(main())
