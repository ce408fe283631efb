"""Detectron2's own predictor, trainer and evaluation with a VL-NMS head in the config."""

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from small_models import build


@pytest.fixture
def detection_config(config, tiny_refshapes, tmp_path):
    cfg = config()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 16
    cfg.DATASETS.TRAIN = (f"{tiny_refshapes}_instances_train",)
    cfg.DATASETS.TEST = (f"{tiny_refshapes}_instances_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.MAX_ITER = 2
    cfg.OUTPUT_DIR = str(tmp_path)
    return cfg


def test_default_predictor(config):
    instances = DefaultPredictor(config())(np.zeros((60, 80, 3), np.uint8))["instances"]
    assert {"pred_boxes", "scores", "pred_classes", "pred_masks"} == set(instances.get_fields())


def test_default_trainer_trains_the_detector_when_it_is_not_frozen(detection_config):
    detection_config.MODEL.VLNMS.FREEZE_DETECTOR = False
    trainer = DefaultTrainer(detection_config)
    before = trainer.model.roi_heads.box_head.fc1.weight.clone()
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert not torch.equal(trainer.model.roi_heads.box_head.fc1.weight, before)


@pytest.mark.parametrize("query", [None, "the red cup"])
def test_coco_evaluator(detection_config, query):
    name = detection_config.DATASETS.TEST[0]
    model = build(detection_config)
    loader = build_detection_test_loader(detection_config, name)
    batches = list(loader)
    if query is not None:
        batches = [[{**i, "query": query} for i in batch] for batch in batches]
    evaluator = COCOEvaluator(name, tasks=("bbox", "segm"), use_fast_impl=False)
    results = inference_on_dataset(model, batches, evaluator)
    assert np.isfinite(results["bbox"]["AP"]) and np.isfinite(results["segm"]["AP"])
