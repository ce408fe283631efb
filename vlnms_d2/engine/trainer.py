"""A `DefaultTrainer` for detectors and for the relatedness branch, which resumes exactly."""

from __future__ import annotations

import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    inference_context,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.model_zoo.model_zoo import _ModelZooUrls
from detectron2.solver import build_optimizer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n

from ..data import GroundingMapper, build_train_loader
from ..data.builtin import REFER_SETS
from ..data.pseudo_gt import load_expressions
from ..evaluation import ProposalRecallEvaluator
from ..evaluation.recall import predict_with_detector
from ..file_io import shown
from ..modeling.text import BiGRU
from .checkpoint import SafeCheckpointer

logger = logging.getLogger(__name__)


class VLNMSTrainer(DefaultTrainer):
    """Trains the config's model: a stock detector, or the relatedness branch on top of one.

    Data sets with expressions (those whose metadata has `evaluator_type` "refer") use
    `GroundingMapper` and `ProposalRecallEvaluator`, all others `DatasetMapper` and `COCOEvaluator`.

    With `SEED` >= 0 a run that resumes after interruption ends with the same weights as an
    uninterrupted one: the order of the images and all random draws depend only on the seed and
    the iteration.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__(cfg)
        self.checkpointer = SafeCheckpointer(
            self._trainer.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        # DefaultTrainer has built its hooks around the checkpointer that this replaces.
        self._hooks.clear()
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """See `DefaultTrainer`; a run that starts from iteration 0 also loads the word vectors.

        Raises:
            ValueError: the run to resume has other settings, or `MODEL.VLNMS.WORD_VECTORS` is set
                and the text encoder is not BiGRU.
        """
        super().resume_or_load(resume)
        self.data_loader.batch_sampler.start_iter = self.start_iter
        path = self.cfg.MODEL.VLNMS.WORD_VECTORS
        if path and self.start_iter == 0:
            encoder = getattr(self.model, "module", self.model).roi_heads.vlnms.text_encoder
            if not isinstance(encoder, BiGRU):
                raise ValueError(
                    f"MODEL.VLNMS.WORD_VECTORS is {path!r}, but MODEL.VLNMS.TEXT_ENCODER "
                    f"{self.cfg.MODEL.VLNMS.TEXT_ENCODER!r} has no word vectors to initialise; "
                    'leave it empty, or use "BiGRU"'
                )
            known, total = encoder.load_word_vectors(path), len(encoder.vocabulary)
            logger.info("%d of %d words of the vocabulary have a vector in %s", known, total, path)

    def state_dict(self) -> dict[str, Any]:
        """See `DefaultTrainer`; with the settings that a run to resume must share."""
        return {**super().state_dict(), "settings": _lasting_settings(self.cfg)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `DefaultTrainer` and `check_resumed`."""
        check_resumed(self.cfg, state_dict)
        super().load_state_dict(state_dict)

    def build_hooks(self) -> list[HookBase]:
        seed = [SeedEveryIteration(self.cfg.SEED)] if self.cfg.SEED >= 0 else []
        return seed + super().build_hooks()

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Adam with the per-part learning rates of `SOLVER.VLNMS`, or Detectron2's SGD.

        Raises:
            ValueError: `SOLVER.VLNMS.OPTIMIZER` names neither, or the model has nothing to train.
        """
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"MODEL.VLNMS.RELATEDNESS {cfg.MODEL.VLNMS.RELATEDNESS!r} on a frozen detector "
                "has nothing to train; evaluate it as it is, with --eval-only"
            )
        name = cfg.SOLVER.VLNMS.OPTIMIZER
        if name == "SGD":
            return build_optimizer(cfg, model)
        if name != "Adam":
            raise ValueError(f"SOLVER.VLNMS.OPTIMIZER is {shown(name)}, expected 'Adam' or 'SGD'")
        factors = {
            "roi_heads.vlnms.visual_encoder.": cfg.SOLVER.VLNMS.VISUAL_ENCODER_LR_FACTOR,
            "roi_heads.vlnms.refinement_encoder.": cfg.SOLVER.VLNMS.VISUAL_ENCODER_LR_FACTOR,
            "roi_heads.vlnms.text_encoder.": cfg.SOLVER.VLNMS.TEXT_ENCODER_LR_FACTOR,
        }

        def lr_factor(parameter_name: str) -> float:
            matches = (f for prefix, f in factors.items() if parameter_name.startswith(prefix))
            return next(matches, 1.0)

        parameters = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            lr_factor_func=lr_factor,
        )
        return maybe_add_gradient_clipping(cfg, torch.optim.Adam)(parameters, lr=cfg.SOLVER.BASE_LR)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        dataset_dicts = training_expressions(cfg)
        if dataset_dicts is not None:
            mapper = GroundingMapper(cfg, is_train=True)
        else:
            dataset_dicts = get_detection_dataset_dicts(
                cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
            )
            mapper = DatasetMapper(cfg, is_train=True)
        return build_train_loader(
            dataset_dicts,
            mapper,
            batch_size=cfg.SOLVER.IMS_PER_BATCH,
            seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        if has_expressions([dataset_name]):
            return build_detection_test_loader(
                dataset=load_expressions([dataset_name], cfg.MODEL.VLNMS.PSEUDO_GT.DIR),
                mapper=GroundingMapper(cfg, is_train=False),
                num_workers=cfg.DATALOADER.NUM_WORKERS,
            )
        return build_detection_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, thresholds: dict[str, float] | None = None
    ) -> DatasetEvaluator:
        """Recall for data sets with expressions, COCO evaluation for the others.

        Args:
            thresholds: see `ProposalRecallEvaluator`; None to choose them on this data set.
        """
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
        if has_expressions([dataset_name]):
            return ProposalRecallEvaluator(
                dataset_name,
                output_dir=output_dir,
                num_proposals=cfg.TEST.DETECTIONS_PER_IMAGE,
                mean_proposals=cfg.TEST.VLNMS.MEAN_PROPOSALS,
                thresholds=thresholds,
            )
        return COCOEvaluator(dataset_name, output_dir=output_dir)

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators=None) -> OrderedDict:
        """Evaluate on each data set of `DATASETS.TEST`, in order.

        The thresholds of the "real" operating point are chosen on the first data set with
        expressions, which should be val, and used unchanged on the others.
        """
        if evaluators is not None:
            return super().test(cfg, model, evaluators)
        unwrapped = getattr(model, "module", model)
        warn_of_seen_images(getattr(unwrapped, "detector_weights", ""), cfg.DATASETS.TEST)
        results, thresholds = OrderedDict(), None
        for name in cfg.DATASETS.TEST:
            evaluator = cls.build_evaluator(cfg, name, thresholds)
            loader = cls.build_test_loader(cfg, name)
            if isinstance(evaluator, ProposalRecallEvaluator):
                # Without the wrapper of DistributedDataParallel: evaluation needs no gradients.
                with inference_context(unwrapped):
                    results[name] = inference_on_dataset(
                        partial(predict_with_detector, unwrapped), loader, evaluator
                    )
                # Only the main process has chosen them.
                thresholds = comm.all_gather(evaluator.thresholds)[0]
            else:
                results[name] = inference_on_dataset(model, loader, evaluator)
            if comm.is_main_process():
                print_csv_format(results[name])
        return results


class SeedEveryIteration(HookBase):
    """Seeds torch before each iteration, so that random draws do not depend on earlier iterations.

    Args:
        seed: `SEED` of the config.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self) -> None:
        # Distinct for up to a million iterations and 4,093 processes.
        torch.manual_seed((self.seed * 1_000_003 + self.trainer.iter) * 4093 + comm.get_rank())


_LASTING = ("SEED", "DATASETS.TRAIN", "INPUT.", "MODEL.", "SOLVER.")
_MAY_CHANGE = {
    *("MAX_ITER", "STEPS", "CHECKPOINT_PERIOD", "DEVICE", "META_ARCHITECTURE", "CHUNK_MEMORY_MB"),
    *("WEIGHTS", "VOCAB", "WORD_VECTORS", "DIR", "CACHE_DIR", "SPACY_PIPELINE"),
    *("MASKS", "OUTPUT_ATTENTION", "FINAL_SCORE_THRESH", "CHECK_WEIGHTS"),
}


def _lasting_settings(cfg: CfgNode | dict, prefix: str = "") -> dict[str, Any]:
    """The settings that training depends on, by key; not how long it lasts, where files are and
    what is done with the model afterwards."""
    found: dict[str, Any] = {}
    for key, value in cfg.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= _lasting_settings(value, f"{name}.")
        elif name.startswith(_LASTING) and key not in _MAY_CHANGE and "_TEST" not in key:
            found[name] = value
    return found


def check_resumed(cfg: CfgNode, state: dict[str, Any]) -> None:
    """Refuse to resume with other settings than those in a trainer's `state_dict`.

    Raises:
        ValueError: names the first that differs.
    """
    settings = _lasting_settings(cfg)
    for key, before in state.get("settings", {}).items():
        if (now := settings.get(key, before)) != before:
            raise ValueError(
                f"{cfg.OUTPUT_DIR}: holds a run of other settings ({key} is {shown(before)} there, "
                f"{shown(now)} now). Give another OUTPUT_DIR, or start again without --resume."
            )


def training_expressions(cfg: CfgNode) -> list[dict[str, Any]] | None:
    """The images of DATASETS.TRAIN with their expressions and pseudo ground truth; None if they
    have no expressions.

    Raises:
        OSError, ValueError: a file is missing or damaged.
    """
    if not has_expressions(cfg.DATASETS.TRAIN):
        return None
    pseudo_gt = cfg.MODEL.VLNMS.PSEUDO_GT
    return load_expressions(cfg.DATASETS.TRAIN, pseudo_gt.DIR, required=pseudo_gt.CONTEXT)


def warn_of_seen_images(detector_weights: str, dataset_names: Sequence[str]) -> None:
    """Warn, once, if recall is measured on images that the detector was trained on: val and test of
    REFER's data sets with weights of Detectron2's model zoo, told by their file name."""
    refer = tuple(f"{one.name}_" for one in REFER_SETS)
    seen = [n for n in dataset_names if n.startswith(refer) and not n.endswith("_train")]
    on_coco = {
        Path(url).name
        for config, url in _ModelZooUrls.CONFIG_PATH_TO_URL_SUFFIX.items()
        if not config.startswith(("Cityscapes", "PascalVOC"))
    }
    if seen and detector_weights in on_coco:
        message = (
            f"The detector ({detector_weights} of Detectron2's model zoo) was trained on images of "
            f"{', '.join(seen)}: recall there is higher than on new images, and not comparable to "
            "the paper's. configs/coco trains detectors without these images."
        )
        log_first_n(logging.WARNING, message, key="message")


def has_expressions(dataset_names) -> bool:
    """Whether the data sets have expressions; raises if only some of them do."""
    answers = {MetadataCatalog.get(name).get("evaluator_type") == "refer" for name in dataset_names}
    if len(answers) > 1:
        raise ValueError(
            f"{tuple(dataset_names)} mixes data sets with and without expressions; train and test "
            "them apart"
        )
    return answers == {True}
