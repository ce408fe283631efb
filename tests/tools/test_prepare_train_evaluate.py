"""Every registered set from a folder in its real format: prepare, train a few steps, evaluate."""

import json

import pytest
import torch
from dataset_folders import (
    KARPATHY_SPLITS,
    make_flickr30k_entities_folder,
    make_karpathy_folder,
    make_refer_folder,
)
from detectron2.data import DatasetCatalog, MetadataCatalog
from small_models import build

from preparation import Preparation, Settings, read_detections
from vlnms_d2.data import register_all
from vlnms_d2.engine.trainer import VLNMSTrainer
from vlnms_d2.language.word_vectors import load_word_vectors

PREFIX = "whole_way_"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    make_refer_folder(folder)
    make_flickr30k_entities_folder(folder)
    for which in KARPATHY_SPLITS:
        make_karpathy_folder(folder, which)
    register_all(folder, prefix=PREFIX)
    yield folder
    for name in [name for name in DatasetCatalog.list() if name.startswith(PREFIX)]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def detections(folder, train: str):
    """A cup and a dog on every image of the data set, as a detector's results file."""
    image_ids = [image["image_id"] for image in DatasetCatalog.get(PREFIX + train)]
    results = [
        {"image_id": i, "category_id": category, "bbox": [10 * category, 5, 30, 40], "score": 0.9}
        for i in image_ids
        for category in (1, 2)
    ]
    categories = [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "categories.json").write_text(json.dumps({"categories": categories}))
    return read_detections(folder / "results.json", folder / "categories.json")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("refcoco_unc_train", "refcoco_unc_testB"),
        ("refcoco_google_train", "refcoco_google_test"),
        ("refcoco+_unc_train", "refcoco+_unc_testA"),
        ("refcocog_umd_train", "refcocog_umd_test"),
        ("refcocog_google_train", "refcocog_google_val"),
        ("flickr30k_entities_train", "flickr30k_entities_test"),
        ("flickr30k_entities_captions_train", "flickr30k_entities_captions_test"),
        ("flickr30k_captions_train", "flickr30k_captions_test"),
        ("coco_captions_train", "coco_captions_test"),
    ],
)
def test_prepare_train_evaluate(root, config, tmp_path, train, test):
    glove = tmp_path / "glove.txt"
    glove.write_text("cup 1 0\ndog 0 1\n")
    without_boxes = train in ("flickr30k_captions_train", "coco_captions_train")
    preparation = Preparation(
        tmp_path / "prepared",
        Settings(word_vectors=str(glove), gamma=0.4, vocab_min_count=1),
        lambda: load_word_vectors(str(glove)),
        detections(tmp_path, train) if without_boxes else None,
        report=lambda line: None,
    )
    preparation.prepare(PREFIX + train)

    cfg = config()
    torch.save({"model": build(cfg).state_dict()}, tmp_path / "tiny.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "tiny.pth")
    cfg.MODEL.VLNMS.PSEUDO_GT.DIR = str(tmp_path / "prepared")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (PREFIX + train,), ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (60,), 120
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR = 2, 3, 1e-3
    cfg.SEED, cfg.OUTPUT_DIR = 3, str(tmp_path / "output")
    (tmp_path / "output").mkdir()
    trainer = VLNMSTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    losses = trainer.storage.history("total_loss").values()
    assert len(losses) == 3 and all(0 < loss < 100 for loss, _ in losses)
    cfg.DATASETS.TEST = (PREFIX + test,)
    results = VLNMSTrainer.test(cfg, trainer.model)
    assert results[PREFIX + test]["recall"]["top15_vlnms_proposals"] >= 1
