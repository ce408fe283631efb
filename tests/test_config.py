"""The keys of the plugin."""

import copy
import inspect
import pickle
import re
from pathlib import Path

import pytest
from conftest import HEADS
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from small_models import stock_config

from vlnms_d2 import add_vlnms_config
from vlnms_d2.config import check_config, default_config, load_config, resolve_paths


def make_config() -> CfgNode:
    cfg = get_cfg()
    add_vlnms_config(cfg)
    return cfg


def flatten(cfg: CfgNode, prefix: str = "") -> dict:
    found = {}
    for key, value in cfg.items():
        name = f"{prefix}{key}"
        found.update(flatten(value, f"{name}.") if isinstance(value, CfgNode) else {name: value})
    return found


# The comment above the key before them speaks of these too.
DOCUMENTED_WITH_THE_KEY_BEFORE = {
    "MODEL.VLNMS.FC.DROPOUT",
    "MODEL.VLNMS.BIGRU.HIDDEN_DIM",
    "MODEL.VLNMS.FUSION_WEIGHT",
    "MODEL.VLNMS.POSITIVE_FRACTION",
    "SOLVER.VLNMS.TEXT_ENCODER_LR_FACTOR",
}


def test_every_key_has_a_comment_line_above_it():
    sections = {"vlnms": "MODEL.VLNMS", "solver": "SOLVER.VLNMS", "test": "TEST.VLNMS"}
    body = inspect.getsource(add_vlnms_config).split('"""')[2]
    above, found, bare = "", set(), set()
    for line in map(str.strip, body.splitlines()):
        key = re.match(r"(vlnms|solver|test)(\.[\w.]+) = (?!CfgNode\(\))", line)
        if key:
            name = sections[key[1]] + key[2]
            found.add(name)
            if not above.startswith("# ") or above.startswith("# ---"):
                bare.add(name)
        above = line
    assert found == flatten(make_config()).keys() - flatten(get_cfg()).keys()
    assert bare == DOCUMENTED_WITH_THE_KEY_BEFORE


def test_keys_are_added_under_vlnms_alone_and_detectron2s_keep_their_values():
    stock, ours = flatten(get_cfg()), flatten(make_config())
    assert {name: ours[name] for name in stock} == stock
    added = ours.keys() - stock.keys()
    parts = ("MODEL.VLNMS.", "SOLVER.VLNMS.", "TEST.VLNMS.")
    assert added and all(name.startswith(parts) for name in added)


def test_a_config_can_be_written_and_read_back(tmp_path):
    cfg = make_config()
    cfg.MODEL.VLNMS.ATTENTION, cfg.TEST.VLNMS.MEAN_PROPOSALS = "additive", 9.5
    (tmp_path / "config.yaml").write_text(cfg.dump())
    read = make_config()
    read.merge_from_file(str(tmp_path / "config.yaml"))
    assert flatten(read.MODEL.VLNMS) == flatten(cfg.MODEL.VLNMS)
    assert flatten(read.SOLVER.VLNMS) == flatten(cfg.SOLVER.VLNMS)
    assert flatten(read.TEST.VLNMS) == flatten(cfg.TEST.VLNMS)


# --- resolve_paths -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """`configs/` with a config, `models/` beside it, and another working directory."""
    for name in ("configs", "models", "far/elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models" / "model.pth").touch()
    (tmp_path / "models" / "vocab.json").touch()
    monkeypatch.chdir(tmp_path / "far" / "elsewhere")
    return tmp_path


def resolved(config_file, weights: str, vocab: str = "") -> tuple[str, str]:
    cfg = make_config()
    cfg.MODEL.WEIGHTS, cfg.MODEL.VLNMS.VOCAB = weights, vocab
    resolve_paths(cfg, config_file)
    return cfg.MODEL.WEIGHTS, cfg.MODEL.VLNMS.VOCAB


def same_file(path: str, expected: Path) -> bool:
    return Path(path).is_absolute() and Path(path).samefile(expected)


def test_paths_are_relative_to_the_config_file(folder):
    weights, vocab = resolved(
        folder / "configs" / "config.yaml", "../models/model.pth", "../models/vocab.json"
    )
    assert same_file(weights, folder / "models" / "model.pth")
    assert same_file(vocab, folder / "models" / "vocab.json")


def test_so_are_the_folders_of_bert_and_of_the_pseudo_ground_truth(folder):
    cfg = make_config()
    cfg.MODEL.VLNMS.BERT.NAME = cfg.MODEL.VLNMS.PSEUDO_GT.DIR = "../models"
    resolve_paths(cfg, folder / "configs" / "config.yaml")
    assert same_file(cfg.MODEL.VLNMS.BERT.NAME, folder / "models")
    assert same_file(cfg.MODEL.VLNMS.PSEUDO_GT.DIR, folder / "models")


def test_the_config_files_path_may_be_relative_itself(folder):
    weights, _ = resolved("../../configs/config.yaml", "../models/model.pth")
    assert same_file(weights, folder / "models" / "model.pth")


def test_a_path_that_exists_as_it_stands_wins(folder):
    (folder / "far" / "elsewhere" / "model.pth").touch()
    (folder / "configs" / "model.pth").touch()
    assert resolved(folder / "configs" / "config.yaml", "model.pth")[0] == "model.pth"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "detectron2://COCO-Detection/model.pkl",
        "https://example.org/model.pth",
        "no/such/model.pth",
        "/no/such/model.pth",
    ],
)
def test_everything_else_is_left_as_it_was_written(folder, value):
    config_file = folder / "configs" / "config.yaml"
    assert resolved(config_file, value, value) == (value, value)


def test_an_address_is_never_looked_for_beside_the_config_file(folder):
    config_file = folder / "configs" / "config.yaml"
    address = "https://example.org/model.pth"
    (folder / "configs" / "https:" / "example.org").mkdir(parents=True)
    (folder / "configs" / "https:" / "example.org" / "model.pth").touch()
    assert resolved(config_file, address)[0] == address


def test_an_absolute_path_stays(folder):
    path = str(folder / "models" / "model.pth")
    assert resolved(folder / "configs" / "config.yaml", path)[0] == path


def test_merge_from_file_resolves_them_as_the_tools_do(folder):
    (folder / "configs" / "base.yaml").write_text(
        "VERSION: 2\nMODEL: {WEIGHTS: ../models/model.pth, VLNMS: {VOCAB: ../models/vocab.json}}\n"
    )
    outer = folder / "far" / "outer.yaml"  # the paths of the base are relative to the base
    outer.write_text("_BASE_: ../configs/base.yaml\nMODEL: {VLNMS: {BERT: {NAME: ../models}}}\n")
    plain = make_config()
    for cfg in (plain, plain.clone(), copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        cfg.merge_from_file(str(outer))
        assert same_file(cfg.MODEL.WEIGHTS, folder / "models" / "model.pth")
        assert same_file(cfg.MODEL.VLNMS.VOCAB, folder / "models" / "vocab.json")
        assert same_file(cfg.MODEL.VLNMS.BERT.NAME, folder / "models")
        assert flatten(cfg) == flatten(load_config(outer))
    assert "load_yaml_with_base" not in vars(get_cfg())


def test_merge_from_file_allows_tags_as_ever(folder):
    path = folder / "configs" / "tag.yaml"
    path.write_text("VERSION: 2\nSEED: !!python/object/apply:int ['7']\n")
    cfg = make_config()
    cfg.merge_from_file(str(path))
    assert cfg.SEED == 7
    with pytest.raises(ValueError, match=r"tag\.yaml"):
        make_config().merge_from_file(str(path), allow_unsafe=False)


def test_a_config_is_loaded_with_its_opts_and_its_paths(folder):
    config_file = folder / "configs" / "own.yaml"
    config_file.write_text(
        "VERSION: 2\nMODEL: {WEIGHTS: ../models/model.pth, VLNMS: {MAX_WORDS: 7, LOSS: ranking}}\n"
    )
    cfg = load_config(config_file, ["MODEL.VLNMS.MAX_WORDS", "9"])
    assert same_file(cfg.MODEL.WEIGHTS, folder / "models" / "model.pth")
    assert (cfg.MODEL.VLNMS.MAX_WORDS, cfg.MODEL.VLNMS.LOSS) == (9, "ranking")
    with pytest.raises(AssertionError, match="NO_SUCH_KEY"):
        load_config(config_file, ["MODEL.VLNMS.NO_SUCH_KEY", "9"])


def test_another_config_file_overrides_the_first_and_pairs_override_both(folder):
    first, second = folder / "configs" / "first.yaml", folder / "far" / "second.yaml"
    first.write_text("VERSION: 2\nMODEL: {WEIGHTS: ../models/model.pth}\nSEED: 1\n")
    vlnms = "{VOCAB: ../models/vocab.json, MAX_WORDS: 7}"
    second.write_text(f"VERSION: 2\nMODEL: {{VLNMS: {vlnms}}}\nSEED: 2\nOUTPUT_DIR: here\n")
    # Its path is relative to the working directory, as everything on a command line is.
    opts = ["SEED", "3", "_BASE_", "../second.yaml", "MODEL.VLNMS.LOSS", "ranking"]
    given = list(opts)
    cfg = load_config(first, opts)
    assert opts == given
    assert (cfg.SEED, cfg.OUTPUT_DIR, cfg.MODEL.VLNMS.LOSS) == (3, "here", "ranking")
    assert cfg.MODEL.VLNMS.MAX_WORDS == 7
    assert same_file(cfg.MODEL.WEIGHTS, folder / "models" / "model.pth")
    assert same_file(cfg.MODEL.VLNMS.VOCAB, folder / "models" / "vocab.json")
    # It is what a file of these two bases is.
    both = folder / "configs" / "both.yaml"
    both.write_text('_BASE_: ["first.yaml", "../far/second.yaml"]\n')
    assert flatten(load_config(both, ["SEED", "3", "MODEL.VLNMS.LOSS", "ranking"])) == flatten(cfg)
    (folder / "configs" / "bad.yaml").write_text("- MODEL")
    with pytest.raises(ValueError, match=r"bad\.yaml: "):
        load_config(first, ["_BASE_", str(folder / "configs" / "bad.yaml")])
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        load_config(first, ["_BASE_", "absent.yaml"])
    with pytest.raises(AssertionError):
        load_config(first, ["_BASE_"])


# --- values that no model can be built with ------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("MODEL.VLNMS.MAX_CANDIDATES", 0, "at least 1"),
        ("MODEL.VLNMS.IOU_THRESHOLD", 50.0, "0 to 1"),
        ("MODEL.VLNMS.CHUNK_MEMORY_MB", -1, "at least 0"),
        ("MODEL.VLNMS.FC.HIDDEN_DIM", 0, "at least 1"),
        ("MODEL.VLNMS.TRANS.HIDDEN_DIM", 0, "at least 1"),
        ("MODEL.VLNMS.TRANS.NUM_HEADS", 0, "at least 1"),
        ("MODEL.VLNMS.BIGRU.HIDDEN_DIM", -3, "at least 1"),
        ("MODEL.VLNMS.MAX_QUERIES_PER_IMAGE", 0, "at least 1"),
        ("MODEL.VLNMS.BATCH_SIZE_PER_QUERY", 0, "a positive number, or a negative one for all"),
        ("MODEL.VLNMS.TRAIN_CANDIDATES", 0, "a positive number, or a negative one for all"),
        ("MODEL.VLNMS.POSITIVE_FRACTION", -0.5, "0 to 1"),
        ("MODEL.VLNMS.REG_WEIGHT", float("inf"), "at least 0"),
        ("MODEL.VLNMS.FUSION_WEIGHT", float("nan"), "0 to 1"),
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", float("nan"), "-1 to 1"),
        ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 50.0, "0 to 1"),
        ("SOLVER.MAX_ITER", -3, "at least 0"),
        ("MODEL.ROI_HEADS.NAME", "VLNMSHed", "; the registered names are: .*VLNMSHead"),
        ("MODEL.META_ARCHITECTURE", "RCNN", "; the registered names are: .*GeneralizedRCNN"),
    ],
)
def test_impossible_values_are_refused_when_they_are_read_or_built(
    config, tmp_path, key, value, expected
):
    """The words of the error are those of tools, which read, and of scripts, which build."""
    cfg = config()
    cfg.merge_from_list([key, value])
    shown = repr(value) if isinstance(value, str) else value
    message = rf"{re.escape(key)} is {shown}(, expected )?{expected}"
    if "_PER_QUERY" not in key and "TRAIN_CANDIDATES" not in key:
        (tmp_path / "config.yaml").write_text("VERSION: 2")
        with pytest.raises(ValueError, match=message):
            load_config(tmp_path / "config.yaml", [key, value])
    if key not in ("MODEL.META_ARCHITECTURE", "MODEL.ROI_HEADS.NAME"):
        with pytest.raises(ValueError, match=message):
            build_model(cfg)


def test_every_range_is_that_of_a_key_and_allows_its_default():
    check_config(default_config())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("fitting", HEADS)
def test_a_head_that_does_not_fit_names_those_that_do(head, fitting):
    cfg = stock_config(HEADS[fitting])
    cfg.MODEL.ROI_HEADS.NAME = head
    if head == fitting or (head == "VLNMSHead" and fitting == "VLNMSCascadeHead"):
        build_model(cfg)
    else:
        with pytest.raises(ValueError, match=rf"{head} does not fit .*: use VLNMSRes5Head for C4"):
            build_model(cfg)


def test_forgotten_keys_are_named():
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(HEADS["VLNMSHead"]))
    cfg.MODEL.DEVICE, cfg.MODEL.ROI_HEADS.NAME = "cpu", "VLNMSHead"
    with pytest.raises(ValueError, match=r"no MODEL\.VLNMS: call vlnms_d2\.add_vlnms_config"):
        build_model(cfg)


@pytest.mark.parametrize("text", ["", "# VERSION: 2", "null", "3", "[VERSION, 2]", "VERSION"])
def test_a_config_without_keys_is_named(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml")
    for name in ("a.yaml", "b.yaml"):
        with pytest.raises(ValueError, match=r"a\.yaml: expected KEY: VALUE pairs .*holds none"):
            load_config(tmp_path / name)
