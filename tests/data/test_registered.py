"""The data sets that the plugin knows by name, from folders as users have them to training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPO
from dataset_folders import (
    KARPATHY_SPLITS,
    REFER_SPLITS,
    make_flickr30k_entities_folder,
    make_karpathy_folder,
    make_refer_folder,
)
from detectron2.data import DatasetCatalog, MetadataCatalog
from small_models import build

from vlnms_d2.data import (
    GroundingMapper,
    register_all,
    register_flickr30k_entities,
    register_karpathy,
    register_refer,
)
from vlnms_d2.data.builtin import REFER_SETS
from vlnms_d2.engine.trainer import VLNMSTrainer

ENTITIES = [
    f"flickr30k_entities_{kind}{split}"
    for kind in ("", "captions_")
    for split in ("train", "val", "test")
]
REFER = [f"{one.name}_{split}" for one in REFER_SETS for split in one.splits]
CAPTIONS = [f"flickr30k_captions_{split}" for split in ("train", "val", "test")]
CAPTIONS += [f"coco_captions_{split}" for split in ("train", "restval", "val", "test")]
PREFIX = "made_"


def forget(prefix: str) -> None:
    for name in [name for name in DatasetCatalog.list() if name.startswith(prefix)]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def make_all(root: Path) -> None:
    make_refer_folder(root)
    make_flickr30k_entities_folder(root)
    for which in KARPATHY_SPLITS:
        make_karpathy_folder(root, which)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of all data sets but RefShapes, registered with a prefix."""
    folder = tmp_path_factory.mktemp("datasets")
    make_all(folder)
    register_all(folder, prefix=PREFIX)
    yield folder
    forget(PREFIX)


def test_the_plugin_registers_them():
    assert len(REFER) == 16 and len(CAPTIONS) == 7
    assert {*REFER, *ENTITIES, *CAPTIONS} <= set(DatasetCatalog.list())


def test_configs_name_registered_data_sets():
    paths = [path for path in (REPO / "configs").glob("*/*.yaml") if "refcoco" in path.parent.name]
    used = set()
    for path in paths:
        datasets = yaml.safe_load(path.read_text()).get("DATASETS", {})
        for names in datasets.values():
            used |= set(names.strip("() ").replace('"', "").replace(" ", "").split(",")) - {""}
    assert {"refcoco_unc_train", "refcocog_umd_test"} <= used <= set(REFER)


@pytest.mark.parametrize("name", [*REFER, *ENTITIES, *CAPTIONS])
def test_each_is_read_and_mapped(root, name, config):
    dataset_dicts = DatasetCatalog.get(PREFIX + name)
    assert MetadataCatalog.get(PREFIX + name).evaluator_type == "refer"
    mapper = GroundingMapper(config(), is_train=False)
    for one in dataset_dicts:
        assert Path(one["file_name"]).is_file()
        found = mapper(one)
        assert (found["height"], found["width"]) == (60, 80)
        assert len(found["query"]) == len(one["expressions"]) > 0
        for described in found["expressions"]:
            boxes = [described["referent_box"], *(described["context_boxes"] or [])]
            for x1, y1, x2, y2 in (box for box in boxes if box is not None):
                assert 0 <= x1 < x2 <= 80 and 0 <= y1 < y2 <= 60


@pytest.mark.parametrize("name", REFER)
def test_refer_has_the_refs_of_its_split_and_the_classes_of_coco(root, name):
    partition, split = name.rsplit("_", 1)
    folder, who = partition.split("_")
    dataset_dicts = DatasetCatalog.get(PREFIX + name)
    expressions = [e for one in dataset_dicts for e in one["expressions"]]
    assert len(expressions) == 2 * REFER_SPLITS[folder][who].count(split)
    assert {e["query"] for e in expressions} == {"the red cup", "dog à gauche"}
    metadata = MetadataCatalog.get(PREFIX + name)
    stock = MetadataCatalog.get("coco_2017_val")
    assert metadata.thing_classes == stock.thing_classes and len(stock.thing_classes) == 80
    assert metadata.thing_dataset_id_to_contiguous_id == stock.thing_dataset_id_to_contiguous_id
    names = [
        metadata.thing_classes[a["category_id"]]
        for one in dataset_dicts
        for a in one["annotations"]
    ]
    assert set(names) <= {"person", "dog", "cup", "toothbrush"} and len(set(names)) > 1


# --- missing files -----------------------------------------------------------------------------


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    register_all(tmp_path / "nowhere", prefix="absent_")
    try:
        for name in (*REFER, *ENTITIES, *CAPTIONS):
            with pytest.raises(FileNotFoundError, match=str(tmp_path / "nowhere")):
                DatasetCatalog.get(f"absent_{name}")
    finally:
        forget("absent_")


@pytest.mark.parametrize(
    ("name", "path", "source"),
    [
        ("refcoco_google_val", "refer/refcoco/refs(google).p", "github.com/lichengunc/refer"),
        ("refcoco+_unc_val", "refer/refcoco+/instances.json", "github.com/lichengunc/refer"),
        ("refcocog_umd_test", "coco/train2014", "cocodataset.org"),
        ("flickr30k_entities_val", "flickr30k_entities/val.txt", "BryanPlummer/flickr30k_entities"),
        ("flickr30k_entities_val", "flickr30k/flickr30k-images", "University of Illinois"),
        ("flickr30k_captions_val", "flickr30k/flickr30k-images", "University of Illinois"),
        ("flickr30k_captions_val", "karpathy/dataset_flickr30k.json", "people/karpathy"),
        ("coco_captions_test", "coco/val2014", "cocodataset.org"),
    ],
)
def test_what_is_missing_is_named_with_its_source(tmp_path, name, path, source):
    make_all(tmp_path)
    register_all(tmp_path, prefix="part_")
    try:
        (tmp_path / path).rename(tmp_path / "elsewhere")
        with pytest.raises(FileNotFoundError) as raised:
            DatasetCatalog.get(f"part_{name}")
    finally:
        forget("part_")
    assert str(tmp_path / path) in str(raised.value) and source in str(raised.value)


@pytest.mark.parametrize(
    ("name", "path", "source"),
    [
        ("refcoco_google_val", "refer/refcoco/refs(google).p", "github.com/lichengunc/refer"),
        ("refcoco+_unc_val", "refer/refcoco+/instances.json", "github.com/lichengunc/refer"),
        (
            "flickr30k_entities_val",
            "flickr30k_entities/Annotations/65567.xml",
            "BryanPlummer/flickr30k_entities",
        ),
        ("coco_captions_test", "karpathy/dataset_coco.json", "people/karpathy"),
    ],
)
def test_what_is_cut_short_is_named_with_its_source(tmp_path, name, path, source):
    make_all(tmp_path)
    register_all(tmp_path, prefix="part_")
    content = (tmp_path / path).read_bytes()
    (tmp_path / path).write_bytes(content[: len(content) // 2])
    try:
        with pytest.raises(ValueError) as raised:
            DatasetCatalog.get(f"part_{name}")
    finally:
        forget("part_")
    assert str(tmp_path / path) in str(raised.value) and source in str(raised.value)


def test_one_missing_image_is_found_at_once(tmp_path):
    make_flickr30k_entities_folder(tmp_path)
    register_all(tmp_path, prefix="part_")
    gone = tmp_path / "flickr30k" / "flickr30k-images" / "36979.jpg"
    gone.unlink()
    try:
        with pytest.raises(FileNotFoundError) as raised:
            DatasetCatalog.get("part_flickr30k_entities_train")
    finally:
        forget("part_")
    assert f"{gone}: no such image, and 1 of the 2 images" in str(raised.value)


# --- folders of one's own ----------------------------------------------------------------------


def test_a_folder_of_another_size_than_published_is_told(tmp_path, caplog):
    make_karpathy_folder(tmp_path, "flickr30k")
    given = DatasetCatalog["flickr30k_captions_val"]
    DatasetCatalog.remove("flickr30k_captions_val")
    try:
        register_karpathy(
            tmp_path / "karpathy" / "dataset_flickr30k.json",
            "flickr30k_captions",
            image_root=tmp_path / "flickr30k" / "flickr30k-images",
            splits=["val"],
        )
        assert len(DatasetCatalog.get("flickr30k_captions_val")) == 1
    finally:
        DatasetCatalog.remove("flickr30k_captions_val")
        DatasetCatalog.register("flickr30k_captions_val", given)
    assert "1 images where the published one has 1,014" in caplog.text


def test_registering_folders_of_ones_own(tmp_path):
    make_all(tmp_path)
    (tmp_path / "refer" / "refcocog").rename(tmp_path / "mine")
    (tmp_path / "coco" / "train2014").rename(tmp_path / "mine" / "images")
    images = tmp_path / "flickr30k" / "flickr30k-images"
    images.rename(tmp_path / "flickr30k_entities" / "flickr30k-images")
    try:
        register_refer(
            tmp_path / "mine",
            "own_refs",
            refs_file="refs(umd).p",
            splits=["val"],
            categories={90: "brush", 47: "mug", 18: "dog", 1: "human"},
        )
        register_flickr30k_entities(tmp_path / "flickr30k_entities", "own_phrases", splits=["val"])
        (refs,) = DatasetCatalog.get("own_refs_val")
        assert {a["category_id"] for a in refs["annotations"]} == {3, 0, 1}
        metadata = MetadataCatalog.get("own_refs_val")
        assert metadata.thing_classes == ["human", "dog", "mug", "brush"]
        assert len(DatasetCatalog.get("own_phrases_val")[0]["expressions"]) == 7
        assert len(DatasetCatalog.get("own_phrases_captions_val")[0]["expressions"]) == 5
        assert "own_phrases_train" not in DatasetCatalog.list()
    finally:
        forget("own_")


def test_an_annotation_of_a_category_that_was_not_given(tmp_path):
    make_refer_folder(tmp_path)
    try:
        register_refer(
            tmp_path / "refer" / "refcoco",
            "own",
            image_root=tmp_path / "coco" / "train2014",
            categories={1: "person", 18: "dog"},
        )
        with pytest.raises(ValueError, match=r"'category_id' is \d+, expected .* \(1, 18\)"):
            DatasetCatalog.get("own_train")
    finally:
        forget("own_")


# --- training ----------------------------------------------------------------------------------


@pytest.fixture
def tiny(config, tmp_path):
    """`tiny(train)`: a config of a calibrated tiny model, two steps long."""

    def make(train: str):
        cfg = config()
        torch.save({"model": build(cfg).state_dict()}, tmp_path / "tiny.pth")
        cfg.MODEL.WEIGHTS = str(tmp_path / "tiny.pth")
        cfg.DATASETS.TRAIN = (PREFIX + train,)
        cfg.DATASETS.TEST = ()
        # The others have no contextual objects of their own.
        cfg.MODEL.VLNMS.PSEUDO_GT.CONTEXT = "entities" in train
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (60, 72), 120
        cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 2, 2
        cfg.SOLVER.BASE_LR = 1e-3
        cfg.SEED = 3
        cfg.OUTPUT_DIR = str(tmp_path / "output")
        (tmp_path / "output").mkdir()
        return cfg

    return make


@pytest.mark.parametrize(
    ("train", "tests"),
    [
        ("refcoco_unc_train", ("refcoco_unc_val",)),
        ("flickr30k_entities_train", ("flickr30k_entities_val",)),
        (
            "flickr30k_entities_captions_train",
            ("flickr30k_entities_captions_val", "flickr30k_captions_test", "coco_captions_test"),
        ),
    ],
)
def test_training_and_evaluation(root, tiny, train, tests):
    cfg = tiny(train)
    trainer = VLNMSTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    losses = trainer.storage.history("total_loss").values()
    assert len(losses) == 2 and all(0 < loss < 100 for loss, _ in losses)
    cfg.DATASETS.TEST = tuple(PREFIX + name for name in tests)
    results = VLNMSTrainer.test(cfg, trainer.model)
    for name in tests:
        recall = results[PREFIX + name]["recall"]
        has_referent, has_context = "captions" not in name, "entities" in name
        assert recall["top15_vlnms_proposals"] >= 1
        assert (recall["top15_vlnms_referent"] >= 0) == has_referent  # NaN without one
        assert (recall["top15_vlnms_context"] >= 0) == has_context


@pytest.mark.parametrize("name", ["flickr30k_captions_train", "coco_captions_train"])
def test_captions_without_boxes_are_refused_for_training(root, tiny, name):
    trainer = VLNMSTrainer(tiny(name))
    with pytest.raises(ValueError, match=r"expression \d+ of .*\.jpg has neither a referent nor"):
        trainer.train()
