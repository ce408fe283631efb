"""A campaign of bad input over all tools: an error that says what is wrong, and nothing touched.

Every case must end in an exit status other than 0, a message without a traceback that names the
file, the key or the value, and no file written or changed; or in the same output as good input.
"""

import json
import math
import pickle
import re
import tempfile
from pathlib import Path

import bad_input
import cv2
import dataset_folders
import exported
import numpy as np
import pytest
import torch
from bad_input import BAD_NUMBERS, run_tool, state_of
from detectron2.data import DatasetCatalog

from reranking import worker
from vlnms_d2.data import register_refer

SEED = 20261125


class RunsCode:
    """Unpickling it writes a file."""

    def __reduce__(self):
        return open, ("was_run", "w")


def by_words(names):
    """In place of the language: a text is about the categories whose names are in it."""

    def encode(texts):
        rows = np.array([[name in text.split() for name in names] for text in texts])
        return np.where(rows, 1.0, 0.1).astype(np.float32)

    return encode


def complaint(name, arguments, folder, expected, out=None, good=None):
    """What is wrong with how a tool treats bad input; None if nothing is.

    Args:
        name, arguments: the tool, and its command line.
        folder: nothing may be written or changed in it, unless the result is right.
        expected: the message has one of these.
        out, good: the output folder, and its files for good input.
    """
    before = state_of(folder)
    try:
        status, error = run_tool(name, arguments)
    except BaseException as crash:
        return f"raised {type(crash).__name__}: {str(crash)[:300]}"
    if status == 0:
        files = exported.files_of(out) if out and out.exists() else {}
        files.pop("manifest.json", None)
        if good is None or files != good:
            return "ended with status 0"
        return None
    if "Traceback" in error:
        return f"showed a traceback: {error[-300:]}"
    message = re.sub("(?s)^usage:.*? error:", "", error)
    if not any(str(word) in message for word in expected):
        return f"does not name {expected}: {message[:300]!r}"
    if len(message) > 3000:
        return f"wrote {len(message)} characters: {message[:200]!r}"
    if state_of(folder) != before:
        changed = {p.name for p in state_of(folder).keys() ^ before.keys()}
        return f"wrote or changed {sorted(changed) or 'a file'}"
    return None


class Campaign:
    """Collects complaints, so that one run shows all of them."""

    def __init__(self):
        self.cases, self.complaints = 0, []

    def case(self, title, *arguments, **more):
        self.cases += 1
        found = complaint(*arguments, **more)
        if found:
            self.complaints.append(f"{title}: {found}")

    def check(self, least):
        assert self.cases >= least
        assert not self.complaints, "\n".join(self.complaints)


@pytest.fixture
def campaign():
    return Campaign()


# --- rerank: detections, annotations, queries, mentions ------------------------------------------

DETECTIONS = [
    {"image_id": i, "category_id": c, "bbox": [5 + 3 * c, 5 * i, 20, 20], "score": (i + c) / 20}
    for i in (1, 2, 3)
    for c in (2, 7, 9, 2)
]  # fmt: skip
INSTANCES = {
    "images": [{"id": i, "file_name": f"{i}.png", "height": 60, "width": 70} for i in (1, 2, 3)],
    "categories": [{"id": i, "name": n} for i, n in ((2, "cat"), (7, "dog"), (9, "cup"))],
    "annotations": [{"id": 10, "image_id": 1, "category_id": 7, "bbox": [10, 10, 20, 20]}],
}
CAPTIONS = {"annotations": [{"image_id": i, "id": 100 + i, "caption": "a dog"} for i in (1, 2, 3)]}
QUERIES = [
    {"image_id": 1, "query_id": 5, "query": "a cup"},
    {"image_id": 2, "query_id": "x", "query": "a dog"},
]
MENTIONS = [{"caption_id": 101, "annotation_ids": [10]}]

BAD_IDS = [..., None, "one", 1.5, [], {}, True]
BAD_IN_RERANK = {
    "detections": {
        "*": [None, 7, "text", []],
        "*.bbox": [..., None, 7, [], [1, 2, 3], [1, 2, 3, 4, 5], ["a", 1, 2, 3], [[1], 2, 3, 4]],
        "*.bbox.2": [-5, *BAD_NUMBERS],
        "*.score": [..., *BAD_NUMBERS],
        "*.image_id": BAD_IDS,
        "*.category_id": [*BAD_IDS, 99],
    },
    "annotations": {
        "images": [..., None, 7, {}],
        "images.*": [None, []],
        "images.*.id": BAD_IDS,
        "images.*.height": [..., *BAD_NUMBERS, 0, -5, 1.5],
        "categories": [..., None, 7, {}, []],
        "categories.*.id": [..., None, [], "x"],
        "categories.*.name": [..., None, 7, "", " ", []],
    },
    "queries": {
        "annotations": [..., None, 7, {}],
        "annotations.*": [None, 7, []],
        "annotations.*.caption": [..., None, 7, []],
        "annotations.*.image_id": [..., None, [], {}],
        "annotations.*.id": [..., None, [], {}],
    },
}


@pytest.fixture
def rerank_files(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "category_relatedness", by_words)
    contents = {"detections": DETECTIONS, "annotations": INSTANCES, "queries": CAPTIONS}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    arguments = [w for name in contents for w in (f"--{name}", str(tmp_path / f"{name}.json"))]
    assert run_tool("rerank", [*arguments, "--out", tmp_path / "good"])[0] == 0
    good = exported.files_of(tmp_path / "good")
    good.pop("manifest.json")
    return contents, arguments, good


def rerank_case(campaign, tmp_path, rerank_files, name, title, content, suffix=".json"):
    _, arguments, good = rerank_files
    case = tmp_path / f"case{campaign.cases}"
    case.mkdir()
    file = case / f"bad{suffix}"
    file.write_bytes(content)
    words = [*arguments, f"--{name}", str(file), "--out", str(case / "out")]
    expected = [file.name, "unknown", "not in"]
    campaign.case(
        f"rerank --{name}, {title}", "rerank", words, case, expected, out=case / "out", good=good
    )


@pytest.mark.parametrize("name", list(BAD_IN_RERANK))
def test_rerank_with_damaged_files(campaign, tmp_path, rerank_files, name):
    content = json.dumps(rerank_files[0][name]).encode()
    for title, damage in bad_input.damaged(content, SEED):
        rerank_case(campaign, tmp_path, rerank_files, name, title, damage)
    campaign.check(14)


@pytest.mark.parametrize("name", list(BAD_IN_RERANK))
def test_rerank_with_bad_values(campaign, tmp_path, rerank_files, name):
    cases = bad_input.with_bad_values(rerank_files[0][name], BAD_IN_RERANK[name], SEED)
    for title, content in cases:
        rerank_case(campaign, tmp_path, rerank_files, name, title, content)
    campaign.check(15)


def test_rerank_with_other_queries_and_mentions(campaign, tmp_path, rerank_files):
    bad = {
        "*": [None, 7, "text", []],
        "*.query": [..., None, 7, []],
        "*.image_id": [..., None, []],
        "*.query_id": [..., None, [], {}],
    }
    for title, content in bad_input.with_bad_values(QUERIES, bad, SEED):
        lines = "".join(json.dumps(line) + "\n" for line in json.loads(content)).encode()
        rerank_case(campaign, tmp_path, rerank_files, "queries", title, lines, ".jsonl")
    pickles = {
        "code": pickle.dumps(RunsCode()),
        "a number": pickle.dumps(7),
        "a dictionary": pickle.dumps({"refs": 1}),
        "truncated": pickle.dumps([{"sentences": []}])[:-5],
        "null": pickle.dumps(None),
        "deep": pickle.dumps([{"sentences": [[[[[[1]]]]]]}]),
    }
    for title, content in pickles.items():
        rerank_case(campaign, tmp_path, rerank_files, "queries", title, content, ".p")
    bad = {
        "*": [None, 7, []],
        "*.caption_id": [..., None, 999, [], {}],
        "*.annotation_ids": [..., None, 7, [999], [[]], ["x"]],
    }
    for title, content in bad_input.with_bad_values(MENTIONS, bad, SEED):
        rerank_case(campaign, tmp_path, rerank_files, "mentions", title, content)
    campaign.check(30)


def test_corners_in_place_of_sizes(tmp_path, rerank_files):
    _, arguments, _ = rerank_files

    def run(out, changed):
        boxes = [changed(index, *each["bbox"]) for index, each in enumerate(DETECTIONS)]
        content = [each | {"bbox": box} for each, box in zip(DETECTIONS, boxes, strict=True)]
        (tmp_path / "corners.json").write_text(json.dumps(content))
        words = [*arguments, "--detections", tmp_path / "corners.json", "--out", tmp_path / out]
        return run_tool("rerank", words)

    status, error = run("a", lambda _, x, y, w, h: [x + 30, y + 30, x + 30 + w, y + 30 + h])
    assert status == 1 and "corners.json: 12 of 12 boxes" in error
    assert "expected [x, y, width, height]" in error and not (tmp_path / "a").exists()
    # All boxes of one image end outside of it, as those of some detectors do.
    assert run("b", lambda i, x, y, w, h: [x, y, w + 60 * (i < 4), h])[0] == 0
    assert run("c", lambda i, x, y, w, h: [x, y, w + 60 * (i < 7), h])[0] == 1


# --- options --------------------------------------------------------------------------------


def test_options_of_rerank(campaign, tmp_path, rerank_files):
    options = [
        *(["--nms-thresh", v] for v in ("nan", "-1", "2", "x", "inf")),
        *(["--top-n", v] for v in ("0", "-3", "1.5", "x")),
        *(["--score-thresh", v] for v in ("nan", "x")),
        *(["--mean-proposals", v] for v in ("0", "-1", "nan", "inf", "x")),
        *(["--processes", v] for v in ("0", "-1", "x")),
        *(["--pictures", v] for v in ("-1", "x")),
        ["--pictures", "2"],
        ["--format", "nothing"],
        ["--top-n", "5", "--mean-proposals", "3"],
        ["--split", "val"],
        ["--mentions", tmp_path / "none.json"],
        ["--image-dir", tmp_path / "none", "--pictures", "1"],
        ["--detections", tmp_path / "none.json"],
        ["--annotations", tmp_path],
        ["--queries", tmp_path / "none"],
    ]
    for more in options:
        _, arguments, _ = rerank_files
        words = [*arguments, "--out", tmp_path / "out", *more]
        key = str(more[-2])
        expected = [key, key.strip("-").replace("-", "_"), str(more[-1]), "--score-thresh"]
        campaign.case(
            f"rerank {' '.join(map(str, more))[:60]}", "rerank", words, tmp_path, expected
        )
    campaign.check(25)


def test_options_of_the_other_tools(campaign, tmp_path):
    for name in ("empty", "words", "list"):
        (tmp_path / f"{name}.json").write_text({"empty": "", "words": "{x", "list": "[1]"}[name])
    none, a_file = tmp_path / "none", tmp_path / "list.json"
    out = ["--out", tmp_path / "out"]
    rec = [
        "rec",
        "--cache",
        none,
        "--train",
        "no_set",
        "--test",
        "none_either",
        "--sources",
        "s",
        *out,
    ]
    extract = ["--datasets", "t", *out]
    proposals = ["--proposals", "a=b.yaml"]
    folds = ["--detections", none, "--annotations", none, "--captions", none, "--mentions", none]
    cases = [
        *(("make_refshapes", [*out, "--size", v]) for v in ("0x0", "1x1", "x", "-5x7", "9")),
        *(("make_refshapes", [*out, "--train", v]) for v in ("-1", "x", "1e3")),
        ("make_refshapes", [*out, "--workers", "0"]),
        ("make_refshapes", ["--out", a_file]),
        ("make_refshapes_captions", ["--refshapes", none, *out]),
        ("make_refshapes_captions", ["--refshapes", a_file, *out]),
        *(("recall_table", [tmp_path / f"{v}.json"]) for v in ("empty", "words", "list", "none")),
        ("recall_table", [tmp_path]),
        ("second_stage_table", ["--runs", none, *out]),
        ("second_stage_table", ["--runs", a_file, *out]),
        ("train_second_stage", rec),
        ("train_second_stage", [*rec, "--same-images", "x"]),
        ("train_second_stage", [*rec, "--mean-proposals", "x"]),
        ("extract_second_stage", [*extract, "--what", "gt", "--proposals", "x"]),
        ("extract_second_stage", [*extract, "--what", "x", *proposals]),
        ("extract_second_stage", [*extract, "--what", "a", *proposals, "--group", "0"]),
        ("train_tagger", ["--treebank", none, *out]),
        ("train_tagger", ["--treebank", tmp_path, *out]),
        ("train_tagger", ["--treebank", none, "--epochs", "0", *out]),
        ("calibrate_words", ["--dataset", "nothing"]),
        ("calibrate_words", ["--dataset", "nothing", "--word-vectors", none]),
        ("cross_validate_category", folds),
        ("cross_validate_category", [*folds, "--folds", "1"]),
        ("run_ablations", [*out, "--jobs", "0"]),
        ("run_ablations", [*out, "--configs", none]),
        ("run_ablations", [*out, "--configs", a_file]),
        ("run_ablations", [*out, "--seeds", "x"]),
        ("run_ablations", [*out, "--seeds", "0", "--", "NO.KEY", "1"]),
        ("run_ablations", [*out, "--seeds", "0", "--", "SOLVER.MAX_ITER"]),
        ("benchmark", ["nothing"]),
        ("benchmark", ["nms", "--rounds", "0"]),
        ("benchmark", ["nms", "--queries", "-1"]),
        ("benchmark", ["nms", "--plot", tmp_path / "x.png"]),
        ("benchmark", ["overhead", "--config-file", none]),
        ("prepare_data", ["--datasets", "nothing"]),
        ("prepare_data", ["--datasets", "nothing", "--processes", "0"]),
        ("prepare_data", ["--datasets", "nothing", "--detections", none]),
        ("prepare_data", ["--datasets", "nothing", "--gamma", "nan"]),
        ("second_stage_masks", ["--config-file", none, "--datasets", "x", "--runs", none]),
        ("second_stage_masks", ["--config-file", a_file, "--datasets", "x", "--runs", none]),
        ("export_weights", [none, tmp_path / "w.pth"]),
        ("export_weights", [a_file, tmp_path / "w.pth"]),
        ("export_weights", [tmp_path, tmp_path / "w.pth"]),
        ("train_net", []),
        ("train_net", ["--num-gpus", "x"]),
    ]  # fmt: skip
    for name, words in cases:
        texts = [str(word) for word in words]
        expected = [*texts, *(Path(text).name for text in texts), *(t.strip("-") for t in texts)]
        expected += [text.split("=")[-1] for text in texts]
        expected = [text for text in expected if len(text) > 1] + ["--config-file", "checkpoint"]
        title = f"{name} {' '.join(texts).replace(str(tmp_path), '')}"
        campaign.case(title, name, words, tmp_path, expected)
    campaign.check(45)


# --- configs, weights and images ------------------------------------------------------------------


@pytest.fixture
def model(config, tmp_path):
    """A small model and a data set."""
    folder = tmp_path / "model"
    folder.mkdir()
    exported.make_dataset(tmp_path / "datasets")
    exported.register(tmp_path / "datasets")
    yield exported.save_model(config(), folder).config_file
    DatasetCatalog.remove(exported.DATASET)


BAD_CONFIGS = {
    "empty": "",
    "null": "null",
    "list": "- 1\n- 2\n",
    "text": "just words",
    "number": "7",
    "tag": "MODEL: !!python/object/apply:os.system ['touch was_run']\n",
    "tab": "MODEL:\n\tDEVICE: cpu\n",
    "unknown key": "MODEL:\n  NOTHING: 1\n",
    "wrong type": "MODEL:\n  VLNMS:\n    MAX_WORDS: many\n",
    "not a node": "MODEL: 7\n",
    "deep": "MODEL: " + "[" * 5000 + "]" * 5000 + "\n",
    "base to itself": "_BASE_: bad.yaml\n",
    "missing base": "_BASE_: nothing.yaml\n",
    "base a number": "_BASE_: 7\n",
    "NUL": "MODEL:\n  DEVICE: \0\n",
}


@pytest.mark.parametrize("tool", ["demo", "export_proposals", "export_pairs", "train_net"])
def test_configs(campaign, tmp_path, model, tool):
    case = tmp_path / "case"
    case.mkdir()
    for title, text in BAD_CONFIGS.items():
        (case / "bad.yaml").write_text(text)
        words = ["--config-file", case / "bad.yaml"]
        if tool == "demo":
            words += ["--output", case / "out"]
        elif tool != "train_net":
            words += ["--dataset", exported.DATASET, "--num-gpus", "0", "--out", case / "out"]
        else:
            words += ["OUTPUT_DIR", case / "out"]
        expected = ["bad.yaml", "nothing.yaml", "NOTHING", "MAX_WORDS", "MODEL"]
        campaign.case(f"{tool}, {title}", tool, words, case, expected)
    campaign.check(15)


BAD_KEYS = [
    ("MODEL.ROI_HEADS.NAME", "Nothing"),
    ("MODEL.META_ARCHITECTURE", "Nothing"),
    ("MODEL.VLNMS.RELATEDNESS", "Nothing"),
    ("MODEL.VLNMS.TEXT_ENCODER", "Nothing"),
    ("MODEL.VLNMS.VOCAB", "nothing.json"),
    ("MODEL.VLNMS.MAX_WORDS", "0"),
    ("MODEL.VLNMS.ATTENTION", "none"),
    ("MODEL.VLNMS.VISUAL_ENCODER", "none"),
    ("MODEL.VLNMS.FUSION", "none"),
    ("MODEL.VLNMS.PRECISION", "float8"),
    ("MODEL.VLNMS.MASKS", "none"),
    ("MODEL.VLNMS.FC.HIDDEN_DIM", "[[]]"),
    ("MODEL.VLNMS.NOTHING", "1"),
    ("MODEL.WEIGHTS", "nothing.pth"),
    ("MODEL.WEIGHTS", "bad.pth"),
    ("MODEL.WEIGHTS", "bad.pkl"),
]


def test_keys_and_weights_of_exports(campaign, tmp_path, model, monkeypatch):
    case = tmp_path / "case"
    case.mkdir()
    monkeypatch.chdir(case)
    (case / "bad.pth").write_bytes(b"no weights")
    (case / "bad.pkl").write_bytes(pickle.dumps({"model": RunsCode()}))
    for key, value in BAD_KEYS:
        words = ["--config-file", model, "--dataset", exported.DATASET, "--num-gpus", "0"]
        words += ["--out", case / "out", "--opts", key, value]
        campaign.case(
            f"{key} {value}", "export_proposals", words, case, [key.split(".")[-1], value]
        )
    campaign.check(15)


def test_weights_of_the_demo(campaign, tmp_path, model):
    case = tmp_path / "case"
    case.mkdir()
    cv2.imwrite(str(case / "photo.png"), np.full((60, 70, 3), 128, np.uint8))
    weights = torch.load(model.parent / "weights.pth", weights_only=True)["model"]
    name = next(key for key in weights if "vlnms" in key and weights[key].dim() == 2)
    detector = {key: value for key, value in weights.items() if ".vlnms." not in key}
    bad = {
        "detector only": {"model": detector},
        "branch only": {"model": {k: v for k, v in weights.items() if ".vlnms." in k}},
        "nothing": {"model": {}},
        "another model's": {"model": {"conv.weight": torch.ones(3)}},
        "not finite": {"model": {**weights, name: weights[name] * float("nan")}},
        "other shapes": {"model": {**weights, name: weights[name][:-1]}},
        "lists": {"model": [1, 2]},
        "a list": [1, 2],
        "code": {"model": RunsCode()},
    }
    for title, content in bad.items():
        torch.save(content, case / "bad.pth")
        words = ["--config-file", model, "--output", case / "out"]
        words += ["--input", case / "photo.png", "--query", "dog"]
        words += ["--opts", "MODEL.WEIGHTS", case / "bad.pth"]
        campaign.case(f"demo, weights: {title}", "demo", words, case, ["bad.pth", "MODEL.WEIGHTS"])
    campaign.check(9)


def test_no_option_stands_for_another(campaign, tmp_path, model):
    """Values and combinations of the exports' own options."""
    (tmp_path / "pairs.jsonl").write_text('[1, 2]\n{"a": 1}\n')
    base = ["--config-file", model, "--dataset", exported.DATASET, "--num-gpus", "0"]
    base += ["--out", tmp_path / "out"]
    proposals = [
        *(["--top-n", v] for v in ("0", "-1", "x")),
        *(["--block-size", v] for v in ("0", "-1", "x")),
        *(["--mean-proposals", v] for v in ("0", "nan", "-2")),
        ["--score-thresh", "nan"],
        ["--tsv-boxes", "5", "2"],
        ["--processes", "0"],
        ["--num-machines", "0"],
        ["--machine-rank", "3"],
        ["--categories-of", "nothing"],
        ["--masks", "--format", "nmtree"],
        ["--format", "jsonl", "jsonl", "nothing"],
        ["--ddpn-annotations", tmp_path / "none"],
        ["--opts", "MODEL.WEIGHTS"],
        ["--dataset", "nothing"],
    ]
    pairs = [
        *(["--top-n", v] for v in ("0", "-1", "x")),
        ["--boxes", "0"],
        ["--dtype", "int8"],
        ["--scan", tmp_path / "pairs.jsonl"],
        ["--dataset", "nothing"],
    ]
    for tool, options in (("export_proposals", proposals), ("export_pairs", pairs)):
        for more in options:
            texts = [str(word) for word in more]
            expected = [*texts, *(t.strip("-").replace("-", "_") for t in texts)]
            expected += ["OPTS", "odd length", "masks"]
            title = f"{tool} {' '.join(texts).replace(str(tmp_path), '')}"
            campaign.case(title, tool, [*base, *more], tmp_path, expected)
    campaign.check(25)


# --- images, word vectors and training data --------------------------------------------------


def write_all(folder, files):
    """Write (name, bytes) into a folder; returns the paths."""
    folder.mkdir()
    paths = []
    for name, content in files:
        paths.append(folder / name)
        paths[-1].write_bytes(content)
    return paths


def test_images_of_the_demo(tmp_path, model):
    bad = write_all(tmp_path / "bad", bad_input.bad_images(SEED))
    good = write_all(tmp_path / "good", bad_input.unusual_images(SEED))
    out = tmp_path / "out"
    words = ["--config-file", model, "--output", out, "--query", "dog", "--input", *bad, *good]
    before = state_of(tmp_path / "bad")
    status, error = run_tool("demo", words)
    assert status == 1 and "Traceback" not in error and len(error) < 400 * len(bad)
    assert [path.name for path in bad if str(path) not in error] == []
    assert [path.name for path in good if str(path) in error] == []
    images = json.loads((out / "proposals.json").read_text())["images"]
    assert [image["file"] for image in images] == list(map(str, good))
    assert state_of(tmp_path / "bad") == before


def test_images_of_an_export(campaign, tmp_path, model):
    """One of the five images of the data set is damaged; the message names it."""
    image = sorted((tmp_path / "datasets").rglob("*.jpg"))[2]
    words = ["--config-file", model, "--dataset", exported.DATASET, "--num-gpus", "0"]
    words += ["--out", tmp_path / "case" / "out"]
    (tmp_path / "case").mkdir()
    chosen = ("cut0.jpg", "text.jpg", "empty.jpg", "bomb.png", "thin.png", "gray16.png")
    files = dict(bad_input.bad_images(SEED))
    for name in chosen:
        image.write_bytes(files[name])
        campaign.case(f"export, {name}", "export_proposals", words, tmp_path / "case", [image.name])
    image.unlink()
    campaign.case("export, missing", "export_proposals", words, tmp_path / "case", [image.name])
    campaign.check(7)


def test_pictures_of_rerank(campaign, tmp_path, rerank_files):
    _, arguments, _ = rerank_files
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in (1, 2, 3):
        cv2.imwrite(str(photos / f"{i}.png"), np.zeros((60, 70, 3), np.uint8))
    for name, content in bad_input.bad_images(SEED):
        (photos / "1.png").write_bytes(content)
        words = [*arguments, "--image-dir", photos, "--pictures", "3", "--out", tmp_path / "out"]
        if name != "thin.png":  # need not be resized
            campaign.case(f"pictures, {name}", "rerank", words, tmp_path, ["1.png"])
    campaign.check(15)


def test_word_vectors(campaign, tmp_path, model):
    (tmp_path / "out").mkdir()
    for path in write_all(tmp_path / "vectors", bad_input.bad_vectors(SEED)):
        words = ["--datasets", exported.DATASET, "--word-vectors", path, "--out", tmp_path / "out"]
        campaign.case(f"vectors, {path.name}", "prepare_data", words, tmp_path, [path.name])
    campaign.check(20)


BAD_REFS = {
    "*": [None, 7],
    "*.ann_id": [..., "one", 1.5, 999],
    "*.image_id": [None, 999],
    "*.split": [..., 7],
    "*.sentences": [None, [7], [{}]],
    "*.sentences.0.sent_id": [..., "x", 1],
}
BAD_INSTANCES = {
    "images": [..., 7, []],
    "images.*": [None],
    "images.*.id": [..., "x"],
    "images.*.file_name": [None],
    "images.*.height": [..., "7", 0, math.nan],
    "annotations": [..., 7],
    "annotations.*": [None],
    "annotations.*.bbox": [..., [1, 2, 3], [0, 0, math.nan, 5]],
    "annotations.*.category_id": [..., 99],
}


@pytest.fixture
def training(config, tmp_path, monkeypatch):
    """`run(name, content, *opts)`: the words that train on a data set with one file replaced."""
    root = tmp_path / "datasets"
    dataset_folders.make_refer_folder(root)
    refs = dataset_folders._refs(("train",) * 5)
    (root / "refer" / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    kept = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    name = "damaged_train"
    register_refer(root / "refer" / "refcoco", "damaged", image_root=root / "coco" / "train2014")
    cfg = config()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.VLNMS.VOCAB = 80, ""
    cfg.MODEL.VLNMS.PSEUDO_GT.DIR = str(root)
    cfg.MODEL.VLNMS.PSEUDO_GT.CONTEXT = False
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), ()
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH = 0, 2, 1
    (tmp_path / "train.yaml").write_text(cfg.dump())
    words = ["--config-file", tmp_path / "train.yaml", "--num-gpus", "0"]

    def run(path, content, *opts):
        for file, before in kept.items():
            file.write_bytes(before)
        (root / path).parent.mkdir(exist_ok=True)
        if content is not None:
            (root / path).write_bytes(content)
        else:
            (root / path).unlink()
        return [*words, *opts, "OUTPUT_DIR", tmp_path / "out"]

    yield run
    for one in DatasetCatalog.list():
        if one.startswith("damaged_"):
            DatasetCatalog.remove(one)


def refs_and_instances(folder):
    refs = pickle.loads((folder / "refs(unc).p").read_bytes(), encoding="utf-8")
    return refs, json.loads((folder / "instances.json").read_text())


def test_expressions_to_train_on(campaign, tmp_path, training):
    folder = tmp_path / "datasets" / "refer" / "refcoco"
    refs, instances = refs_and_instances(folder)
    for title, content in bad_input.with_bad_values(refs, BAD_REFS, SEED):
        damaged = pickle.dumps(json.loads(content), 2)
        words = training("refer/refcoco/refs(unc).p", damaged)
        campaign.case(f"refs, {title}", "train_net", words, tmp_path, ["refs(unc).p"])
    content = (folder / "refs(unc).p").read_bytes()
    for title, damaged in {
        "missing": None,
        "empty": b"",
        "truncated": content[:-100],
        "code": pickle.dumps(RunsCode()),
        "no refs": pickle.dumps([]),
        "text": b"refs",
    }.items():
        words = training("refer/refcoco/refs(unc).p", damaged)
        campaign.case(f"refs, {title}", "train_net", words, tmp_path, ["refs(unc).p"])
    for title, damaged in bad_input.with_bad_values(instances, BAD_INSTANCES, SEED):
        words = training("refer/refcoco/instances.json", damaged)
        campaign.case(f"instances, {title}", "train_net", words, tmp_path, ["instances.json"])
    content = json.dumps(instances).encode()
    for title, damaged in list(bad_input.damaged(content, SEED))[::4]:
        words = training("refer/refcoco/instances.json", damaged)
        campaign.case(f"instances, {title}", "train_net", words, tmp_path, ["instances.json"])
    campaign.check(40)


PSEUDO_GT = {
    "version": 1,
    "dataset": "damaged_train",
    "contexts": {str(i): [10 * (i // 2) + 1] for i in range(4)},
}
BAD_PSEUDO_GT = {
    "version": [..., None, 99, "1"],
    "contexts": [..., None, 7, []],
    "contexts.0": [..., None, 7, {}, [999], ["1"], [None], [[]]],
}


def test_other_data_to_train_on(campaign, tmp_path, training):
    context = ("MODEL.VLNMS.PSEUDO_GT.CONTEXT", "True")
    path = "damaged_train/pseudo_gt.json"
    damaged = list(bad_input.damaged(json.dumps(PSEUDO_GT).encode(), SEED))[::4]
    for title, content in [*damaged, *bad_input.with_bad_values(PSEUDO_GT, BAD_PSEUDO_GT, SEED)]:
        words = training(path, content, *context)
        campaign.case(f"pseudo-GT, {title}", "train_net", words, tmp_path, ["pseudo_gt.json"])
    (tmp_path / "datasets" / path).unlink()
    image = f"coco/train2014/{dataset_folders.coco_file_name(9)}"
    words = training(image, None)
    campaign.case("missing image", "train_net", words, tmp_path, [Path(image).name])
    # Only training itself reads images and word vectors: its output folder has a config then.
    (tmp_path / "elsewhere").mkdir()
    files = dict(bad_input.bad_images(SEED))
    for name, workers in (("cut0.jpg", "0"), ("text.jpg", "1")):
        more = ("DATALOADER.NUM_WORKERS", workers, "SOLVER.MAX_ITER", "5")  # each image once
        words = training(image, files[name], *more)
        words[-1] = tempfile.mkdtemp(dir=tmp_path)
        campaign.case(f"{name}, {workers}", "train_net", words, tmp_path / "datasets", [image])
    vectors = dict(bad_input.bad_vectors(SEED))
    for path in write_all(tmp_path / "vectors", [(n, vectors[n]) for n in ("nan.txt", "cut.gz")]):
        words = training(image, files[name], "MODEL.VLNMS.WORD_VECTORS", path)
        words[-1] = tempfile.mkdtemp(dir=tmp_path)
        campaign.case(path.name, "train_net", words, tmp_path / "vectors", [path.name])
    campaign.check(20)
