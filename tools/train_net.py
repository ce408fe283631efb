#!/usr/bin/env python
"""Train or evaluate a detector or VL-NMS, in the manner of Detectron2's own train_net.py.

python tools/train_net.py --config-file configs/refshapes/vlnms_fc.yaml
python tools/train_net.py --config-file ... --resume
python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
"""

from __future__ import annotations

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch

from vlnms_d2.config import load_config
from vlnms_d2.engine.trainer import VLNMSTrainer, build_vocabulary


def setup(args) -> CfgNode:
    """The config that the command line describes; writes it to the output folder."""
    cfg = load_config(args.config_file, args.opts)
    # Evaluation looks at every operating point, so nothing may be cut before.
    cfg.MODEL.VLNMS.FINAL_SCORE_THRESH = 0.0
    if not args.eval_only:
        build_vocabulary(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def main(args):
    """What each process runs."""
    cfg = setup(args)
    if args.eval_only:
        model = VLNMSTrainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        return VLNMSTrainer.test(cfg, model)
    trainer = VLNMSTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    launch(
        main,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(arguments,),
    )
