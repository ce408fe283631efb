#!/usr/bin/env python
"""Train or evaluate a detector or VL-NMS, like Detectron2's own train_net.py.

python tools/train_net.py --config-file configs/refshapes/vlnms_fc.yaml
python tools/train_net.py --config-file ... --num-gpus 8 SOLVER.BASE_LR 0.001
python tools/train_net.py --config-file ... --resume
python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth

# on several machines
python tools/train_net.py --config-file ... --num-machines 2 --machine-rank 0 --dist-url URL
python tools/train_net.py --config-file ... --num-machines 2 --machine-rank 1 --dist-url URL
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parent))  # if other code runs this file

from import_option import add_import_option

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of `detectron2.engine.default_argument_parser`, which takes seconds to import."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="path to the config file")
    add("--resume", action="store_true", help="resume from the last checkpoint in OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate on DATASETS.TEST, do not train")
    add("--num-gpus", type=int, default=1, metavar="G", help="per machine; default: %(default)s")
    add("--num-machines", type=int, default=1, metavar="M", help="default: %(default)s")
    add("--machine-rank", type=int, default=0, metavar="R", help="of this machine, from 0")
    # As in Detectron2: a port that depends on the user only, so that orphan processes of an earlier
    # run are noticed.
    user = os.getuid() if sys.platform != "win32" else 1
    port = 2**15 + 2**14 + hash(user) % 2**14
    url = f"tcp://127.0.0.1:{port}"
    add("--dist-url", default=url, metavar="URL", help="of rank 0; default: %(default)s")
    rest = argparse.REMAINDER
    add("opts", nargs=rest, default=None, metavar="KEY VALUE", help="override the config; last")
    add_import_option(parser)
    return parser.parse_args(argv)


def output_files(cfg: CfgNode) -> list[Path]:
    """The files that are written anew, and checkpoints; logs are appended to."""
    folder = Path(cfg.OUTPUT_DIR)
    names = ["config.yaml", "last_checkpoint", "model_final.pth"]
    names += [f"inference/recall_{name}.json" for name in cfg.DATASETS.TEST]
    names += [
        f"inference/{name}" for name in ("coco_instances_results.json", "instances_predictions.pth")
    ]
    return [*(folder / name for name in names), *folder.glob(f"model_{'[0-9]' * 7}.pth")]


def has_log(folder: Path) -> bool:
    """Whether Detectron2 has trained or evaluated in the folder before, as its log says."""
    log = folder / "log.txt"
    return log.is_file() and b" detectron2]: " in log.read_bytes()


def build_vocabulary(cfg: CfgNode, images: Sequence[dict[str, Any]] | None = None) -> None:
    """Build a vocabulary, if the config needs one, and set `MODEL.VLNMS.VOCAB` to it, in place.

    It is needed if the text encoder uses a vocabulary, the key is empty, and the training data sets
    have expressions. It is built from these and saved as `{OUTPUT_DIR}/vocab.json`, unless that
    file exists, as in a resumed run.

    Args:
        cfg: the config.
        images: those of the training data sets if they have been read; they are read otherwise.
    """
    from detectron2.utils import comm

    from vlnms_d2.data.pseudo_gt import load_expressions
    from vlnms_d2.engine.trainer import has_expressions
    from vlnms_d2.modeling.relatedness import text_encoder_name
    from vlnms_d2.modeling.text import Vocabulary, text_encoder_class

    if cfg.MODEL.VLNMS.VOCAB or not text_encoder_class(text_encoder_name(cfg)).uses_vocabulary:
        return
    if not has_expressions(cfg.DATASETS.TRAIN):
        return
    path = Path(cfg.OUTPUT_DIR) / "vocab.json"
    if comm.is_main_process() and not path.is_file():
        sentences = (
            expression["query"]
            for image in images or load_expressions(cfg.DATASETS.TRAIN)
            for expression in image["expressions"]
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        vlnms = cfg.MODEL.VLNMS
        vocabulary = Vocabulary.build(sentences, vlnms.VOCAB_MIN_COUNT, vlnms.BIGRU.SPLIT)
        vocabulary.save(path)
        logger = logging.getLogger("vlnms_d2.train_net")
        logger.info("Built a vocabulary of %d words: %s", len(vocabulary), path)
    comm.synchronize()
    cfg.MODEL.VLNMS.VOCAB = str(path)


def setup(args: argparse.Namespace):
    """The config that the command line describes; writes it to the output folder."""
    import torch
    from detectron2.engine import default_setup
    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger
    from fvcore.common.checkpoint import Checkpointer

    from vlnms_d2.config import load_config
    from vlnms_d2.engine.trainer import check_resumed, training_expressions
    from vlnms_d2.file_io import claim, refuse_foreign

    cfg = load_config(args.config_file, args.opts)
    # Evaluation covers every operating point, so no proposal may be removed before.
    cfg.MODEL.VLNMS.FINAL_SCORE_THRESH = 0.0
    outputs = output_files(cfg)
    folder = Path(cfg.OUTPUT_DIR)
    goes_on = args.resume and (folder / "last_checkpoint").is_file()
    if comm.is_main_process() and not (goes_on or has_log(folder)):
        refuse_foreign(*outputs)
    if not args.eval_only:
        if args.resume:  # before anything in the folder is written
            path = Checkpointer(torch.nn.Identity(), cfg.OUTPUT_DIR).get_checkpoint_file()
            if path.endswith(".pth") and os.path.isfile(path):
                checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                check_resumed(cfg, checkpoint.get("trainer", {}))
        # Damaged files are told before any is written.
        build_vocabulary(cfg, training_expressions(cfg) if comm.is_main_process() else None)
    cfg.freeze()
    if comm.is_main_process():
        claim(*outputs)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="vlnms_d2")
    return cfg


def without_traceback(record: logging.LogRecord) -> bool:
    """A filter of the log of errors in training, which the tool shows by itself."""
    if not os.environ.get("VLNMS_TRACEBACK"):
        record.exc_info = None
    return True


def run(args: argparse.Namespace):
    """Train or evaluate, in each process."""
    from vlnms_d2.engine.checkpoint import SafeCheckpointer, load_weights
    from vlnms_d2.engine.trainer import VLNMSTrainer

    cfg = setup(args)
    if args.eval_only:
        model = VLNMSTrainer.build_model(cfg)
        checkpointer = SafeCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        if args.resume and checkpointer.has_checkpoint():
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.WEIGHTS = checkpointer.get_checkpoint_file()
        load_weights(cfg, model)
        return VLNMSTrainer.test(cfg, model)
    logging.getLogger("detectron2.engine.train_loop").addFilter(without_traceback)
    trainer = VLNMSTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parse_args(argv)

    from detectron2.engine import launch

    if not args.config_file:
        raise ValueError("--config-file is missing, expected a file of configs/ or your own")
    launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
