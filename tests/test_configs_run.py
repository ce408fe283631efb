"""Every config trains two iterations and is evaluated, from small folders in the real formats.

The data sets have the names that the configs give them, and what training needs is made by the
documented commands. A small random detector stands in for that of the model zoo, in a file of its
format and name.
"""

import json
import logging
import math
import pickle

import pytest
from conftest import REPO
from dataset_folders import (
    COCO_IDS,
    make_coco_annotations,
    make_flickr30k_entities_folder,
    make_karpathy_folder,
    make_refer_folder,
)
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import logger as detectron2_logger
from documented import commands
from small_models import build
from tiny_bert import save_model

import export_weights
import make_refshapes_captions
import prepare_data
import train_net
from refshapes.expressions import write_expressions
from refshapes.writer import Settings, write_annotations, write_images
from vlnms_d2.config import load_config
from vlnms_d2.data import register_all
from vlnms_d2.engine.checkpoint import load_weights
from vlnms_d2.engine.trainer import VLNMSTrainer, warn_of_seen_images

CONFIGS = REPO / "configs"

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": "50",
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": "8",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "16",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "8",
    "MODEL.FPN.OUT_CHANNELS": "16",
    "MODEL.FPN.NORM": "BN",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "20",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "20",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "32",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "8",
    "MODEL.VLNMS.MAX_CANDIDATES": "40",
    "MODEL.VLNMS.FC.HIDDEN_DIM": "24",
    "MODEL.VLNMS.BIGRU.EMBED_DIM": "12",
    "MODEL.VLNMS.BIGRU.HIDDEN_DIM": "8",
    "MODEL.VLNMS.TRANS.HIDDEN_DIM": "24",
    "MODEL.VLNMS.TRANS.NUM_HEADS": "2",
    "MODEL.VLNMS.TRANS.FFN_DIM": "24",
    "MODEL.VLNMS.VOCAB": "",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": "64",
    "INPUT.MAX_SIZE_TRAIN": "96",
    "INPUT.MAX_SIZE_TEST": "96",
    "DATALOADER.NUM_WORKERS": "0",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.BASE_LR": "0.0001",
    "SOLVER.STEPS": "()",
    "SOLVER.MAX_ITER": "2",
    "TEST.DETECTIONS_PER_IMAGE": "15",
}

# Those that name a data set; the others are their bases.
CASES = {(str(path.relative_to(REPO)), ()) for path in CONFIGS.rglob("*/*.yaml")}
# What docs/paper_tables.md makes of them.
for tool, *words in commands(REPO / "docs" / "paper_tables.md"):
    if tool == "tools/train_net.py":
        args = train_net.parse_args(words)
        CASES.add((args.config_file, tuple(args.opts)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of all data sets with what training needs, registered by their real names."""
    root = tmp_path_factory.mktemp("datasets")
    make_refer_folder(root)
    make_flickr30k_entities_folder(root)
    make_karpathy_folder(root, "flickr30k")
    make_karpathy_folder(root, "coco")
    make_coco_annotations(root)
    (root / "refshapes").mkdir()
    scenes = write_images(root / "refshapes", Settings(5, 320, 240, (2, 1, 1, 1)), workers=1)
    write_annotations(root / "refshapes", scenes)
    write_expressions(scenes, root / "refshapes", seed=5)
    captions = ["--refshapes", str(root / "refshapes"), "--out", str(root / "refshapes_entities")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        patch.chdir(REPO)  # the paths of the documented commands
        register_again(patch, root)
        make_refshapes_captions.main([*captions, "--seed", "0"])
        prepare(root)
        save_model(root / "bert", max_position_embeddings=80)
        yield root


def register_again(patch: pytest.MonkeyPatch, root) -> None:
    for catalog in (DatasetCatalog, MetadataCatalog):
        others = {k: v for k, v in catalog.items() if k.startswith(("coco_2017", "coco_2014_val"))}
        patch.setattr(catalog, "data", others)
    register_all(root)


def prepare(root) -> None:
    """The commands of docs/paper_tables.md, with small vectors of words."""
    (root / "glove.txt").write_text("cup 1 0\ndog 0 1\nclock 1 1\n")
    boxes = [
        {"image_id": i, "category_id": c, "bbox": [10 * c, 5, 30, 40], "score": 0.9}
        for i in (*COCO_IDS, 1, 2)
        for c in (1, 2)
    ]
    (root / "results.json").write_text(json.dumps(boxes))
    categories = [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}]
    (root / "categories.json").write_text(json.dumps({"categories": categories}))
    vectors = ["--word-vectors", str(root / "glove.txt"), "--datasets"]
    expressions = ["refcoco_unc_train", "refcoco+_unc_train", "refcocog_umd_train"]
    tests = ["refcoco_unc_val", "refcoco_unc_testA", "refcoco_unc_testB"]
    captions = ["coco_captions_train", "coco_captions_restval", "coco_captions_val"]
    referents = ["refshapes_referents_train"]
    assert prepare_data.main([*vectors, *expressions, *tests, *captions, *referents]) == 0
    detector = ["--detections", str(root / "results.json")]
    detector += ["--categories", str(root / "categories.json"), "--out", str(root / "wspg")]
    assert prepare_data.main([*detector, *vectors, *expressions, *referents]) == 0


@pytest.fixture(scope="module")
def weights(folder, vocabulary_file):
    """`weights(cfg)`: a file of random weights of the config's detector, as the zoo has them."""
    written = {}

    def write(cfg: CfgNode) -> str:
        roi_heads = cfg.MODEL.ROI_HEADS
        is_c4 = not cfg.MODEL.FPN.IN_FEATURES
        key = (is_c4, roi_heads.NUM_CLASSES)
        imagenet = "ImageNet" in cfg.MODEL.WEIGHTS
        if key not in written:
            cfg = cfg.clone()
            roi_heads = cfg.MODEL.ROI_HEADS
            roi_heads.NAME = "Res5ROIHeads" if is_c4 else "StandardROIHeads"
            cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
            detector = {k: v.numpy() for k, v in build(cfg).state_dict().items()}
            zoo = "model_final_a2914c.pkl" if is_c4 else "model_final_a3ec72.pkl"
            path = folder / f"{roi_heads.NUM_CLASSES}_classes" / zoo
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(pickle.dumps({"model": detector, "__author__": "zoo"}))
            backbone = {
                k.removeprefix("backbone.").removeprefix("bottom_up."): v
                for k, v in detector.items()
                if ".stem." in k or ".res" in k
            }
            content = {"model": backbone, "__author__": "zoo", "matching_heuristics": True}
            path.with_name(f"R-101-{is_c4}.pkl").write_bytes(pickle.dumps(content))
            written[key] = path
        path = written[key]
        return str(path.with_name(f"R-101-{is_c4}.pkl") if imagenet else path)

    return write


@pytest.fixture
def small(folder, weights, tmp_path):
    """`small(config_file, pairs)`: the config with a small model and what its command says."""

    def make(config_file: str, pairs=()) -> CfgNode:
        wspg = "output/pseudo_gt/wspg"
        opts = [str(folder / "wspg") if word == wspg else word for word in pairs]
        cfg = load_config(config_file, [*opts, *(word for pair in SMALL.items() for word in pair)])
        if "wspg" in config_file:
            cfg.MODEL.VLNMS.PSEUDO_GT.DIR = str(folder / "wspg")
        elif "text_similarity" in config_file:
            cfg.MODEL.VLNMS.PSEUDO_GT.DIR = ""
        cfg.MODEL.VLNMS.BERT.NAME = str(folder / "bert")
        cfg.MODEL.VLNMS.PSEUDO_GT.WORD_VECTORS = str(folder / "glove.txt")
        cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = min(1, cfg.MODEL.ROI_MASK_HEAD.NUM_CONV)
        cfg.MODEL.WEIGHTS = weights(cfg)
        cfg.OUTPUT_DIR = str(tmp_path)
        return cfg

    return make


def run(cfg: CfgNode) -> tuple[VLNMSTrainer | None, dict]:
    """As tools/train_net.py runs it."""
    cfg.MODEL.VLNMS.FINAL_SCORE_THRESH = 0.0
    if cfg.MODEL.VLNMS.RELATEDNESS == "Category":
        model = VLNMSTrainer.build_model(cfg)
        load_weights(cfg, model)
        return None, VLNMSTrainer.test(cfg, model)
    train_net.build_vocabulary(cfg)
    trainer = VLNMSTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer, trainer._last_eval_results


@pytest.mark.parametrize(("config_file", "pairs"), sorted(CASES), ids=str)
def test_it_trains_and_is_evaluated(small, config_file, pairs):
    cfg = small(config_file, pairs)
    assert cfg.DATASETS.TEST
    trainer, results = run(cfg)
    if trainer is not None:
        losses = [loss for loss, _ in trainer.storage.history("total_loss").values()]
        assert len(losses) == 2 and all(map(math.isfinite, losses))
        # The ranking loss is 0 where no candidate is positive.
        assert all(loss > 0 for loss in losses) or cfg.MODEL.VLNMS.LOSS == "ranking"
    assert tuple(results) == cfg.DATASETS.TEST
    for of_dataset in results.values():
        if "recall" in of_dataset:
            assert of_dataset["recall"]["top15_vlnms_proposals"] >= 1
        else:
            assert "bbox" in of_dataset


# --- images that the detector has seen ---------------------------------------------------------


@pytest.fixture
def warnings():
    """The trainer's warnings."""
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("vlnms_d2.engine.trainer")
    logger.addHandler(handler)
    detectron2_logger._LOG_COUNTER.clear()
    yield found
    logger.removeHandler(handler)


def forget(warnings: list[str]) -> None:
    warnings.clear()
    detectron2_logger._LOG_COUNTER.clear()


def test_recall_on_images_that_the_zoos_detector_has_seen_is_warned_of_once(
    small, warnings, tmp_path
):
    cfg = small("configs/refcoco/vlnms_fc.yaml")
    trainer, _ = run(cfg)
    VLNMSTrainer.test(cfg, trainer.model)
    [warning] = warnings
    assert "model_final_a3ec72.pkl" in warning and "configs/coco" in warning
    assert ", ".join(cfg.DATASETS.TEST) in warning

    # So with the trained weights, which have another name, and in half precision.
    trained, exported = tmp_path / "model_final.pth", tmp_path / "exported.pth"
    export_weights.export(trained, exported)
    export_weights.export(trained, exported)  # may be replaced
    for path in (trained, exported):
        forget(warnings)
        cfg = small("configs/refcoco/vlnms_fc.yaml", ("DATASETS.TEST", "('refcoco_unc_testA',)"))
        cfg.MODEL.VLNMS.VOCAB = str(tmp_path / "vocab.json")
        cfg.MODEL.WEIGHTS = str(path)
        model = VLNMSTrainer.build_model(cfg)
        load_weights(cfg, model)
        VLNMSTrainer.test(cfg, model)
        assert len(warnings) == 1 and "model_final_a3ec72.pkl" in warnings[0]

    # A run that starts from it or resumes passes the name on.
    trainer.checkpointer.model.detector_weights = ""
    trainer.resume_or_load(resume=True)
    assert trainer.model.detector_weights == "model_final_a3ec72.pkl"


@pytest.mark.parametrize(
    ("detector", "name"),
    [
        ("model_final_a3ec72.pkl", "refcoco_unc_train"),
        ("model_final_a3ec72.pkl", "flickr30k_entities_test"),
        ("model_final_a3ec72.pkl", "refshapes_val"),
        ("model_final_a3ec72.pkl", "coco_2017_val"),
        ("model_final.pth", "refcocog_umd_test"),
        ("R-101.pkl", "refcoco+_unc_testB"),  # of ImageNet
        ("model_final_af9cf5.pkl", "refcoco+_unc_testB"),  # of Cityscapes
        ("", "refcoco_unc_val"),
    ],
)
def test_nothing_else_is_warned_of(warnings, detector, name):
    warn_of_seen_images(detector, ("refcoco_unc_train", name))
    assert not warnings


def test_other_detectors_of_the_zoo_are_known(warnings):
    for name in ("model_final_a2914c.pkl", "model_final_f10217.pkl", "model_final_480dd8.pkl"):
        warn_of_seen_images(name, ("refcocog_google_val",))
    assert len(warnings) == 3
