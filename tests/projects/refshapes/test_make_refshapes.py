from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

import cv2
import pytest
from pycocotools.coco import COCO

from refshapes.scene import COLORS, PATTERNS, SIZES
from refshapes.writer import image_file_name
from vlnms_d2.data.datasets.refshapes import CATEGORIES

TOOL = Path(__file__).parents[3] / "tools" / "make_refshapes.py"
COUNTS = {"train": 4, "val": 2, "testA": 3, "testB": 1}


def load_tool():
    spec = importlib.util.spec_from_file_location("make_refshapes", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def arguments(out: Path, *more: str) -> list[str]:
    counts = [word for split, n in COUNTS.items() for word in (f"--{split}", str(n))]
    return ["--out", str(out), "--seed", "11", *counts, "--workers", "1", *more]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name[0] != "."
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "refshapes"
    assert tool.main(arguments(out)) == 0
    return out


def load(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_images_are_numbered_by_split_and_on_disk(data):
    images = load(data / "instances.json")["images"]
    assert [i["id"] for i in images] == list(range(1, sum(COUNTS.values()) + 1))
    assert [i["split"] for i in images] == [s for s, n in COUNTS.items() for _ in range(n)]
    assert sorted(p.name for p in (data / "images").iterdir()) == [i["file_name"] for i in images]
    for image in images:
        assert image["file_name"] == image_file_name(image["id"])
        height, width, _ = cv2.imread(str(data / "images" / image["file_name"])).shape
        assert (width, height) == (image["width"], image["height"]) == (384, 288)


def test_annotations(data):
    contents = load(data / "instances.json")
    annotations = contents["annotations"]
    assert [a["id"] for a in annotations] == list(range(1, len(annotations) + 1))
    assert [a["image_id"] for a in annotations] == sorted(a["image_id"] for a in annotations)
    assert [c["name"] for c in contents["categories"]] == list(CATEGORIES)
    assert [c["id"] for c in contents["categories"]] == list(range(1, len(CATEGORIES) + 1))
    for a in annotations:
        x, y, w, h = a["bbox"]
        assert 0 <= x < x + w <= 384 and 0 <= y < y + h <= 288
        assert 120 <= a["area"] <= w * h
        assert a["segmentation"] and a["iscrowd"] == 0
        words = a["attributes"]
        assert words["color"] in COLORS
        assert words["pattern"] in PATTERNS
        assert words["size"] in SIZES
        assert 0.45 <= words["visible"] <= 1


def test_each_split_has_its_own_file_with_the_same_records(data):
    whole = load(data / "instances.json")
    for split, count in COUNTS.items():
        part = load(data / "annotations" / f"instances_{split}.json")
        ids = {i["id"] for i in part["images"]}
        assert len(ids) == count
        assert part["images"] == [i for i in whole["images"] if i["split"] == split]
        assert part["annotations"] == [a for a in whole["annotations"] if a["image_id"] in ids]
        assert part["categories"] == whole["categories"]


def test_testA_is_crowded(data):
    part = load(data / "annotations" / "instances_testA.json")
    for image in part["images"]:
        counts = Counter(
            a["category_id"] for a in part["annotations"] if a["image_id"] == image["id"]
        )
        assert max(counts.values()) >= 0.6 * counts.total()


def test_pycocotools_reads_it(data):
    coco = COCO(str(data / "annotations" / "instances_val.json"))
    for annotation in coco.loadAnns(coco.getAnnIds()):
        assert coco.annToMask(annotation).sum() == pytest.approx(annotation["area"], rel=0.08)


def test_expressions_refer_to_annotations(data):
    assert {"refs(refcoco).p", "refs(refcoco+).p", "refs(refcocog).p"} <= set(files(data))


def test_the_number_of_workers_does_not_change_a_byte(data, tmp_path):
    out = tmp_path / "again"
    assert tool.main([*arguments(out)[:-1], "2"]) == 0
    assert files(out) == files(data)


def test_a_finished_data_set_is_left_alone(data, capsys):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    assert tool.main(arguments(data, "--overwrite")) == 0
    assert f"{data} already holds this data set" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_another_data_set_is_not_overwritten_unless_asked(data, tmp_path, capsys):
    out = tmp_path / "other"
    tiny = ["--train", "1", "--val", "0", "--testA", "0", "--testB", "0"]
    assert tool.main(arguments(out, *tiny)) == 0
    before = files(out)
    assert tool.main(arguments(out)) == 2
    message = capsys.readouterr().err
    assert str(out) in message and "--overwrite" in message
    assert files(out) == before
    assert tool.main(arguments(out, "--overwrite")) == 0
    assert files(out) == files(data)


@pytest.mark.parametrize("manifest", [None, "{broken"])
def test_an_unfinished_data_set_is_refused(tmp_path, capsys, manifest):
    (tmp_path / "images").mkdir()
    if manifest is not None:
        (tmp_path / "refshapes.json").write_text(manifest)
    assert tool.main(arguments(tmp_path)) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_overwriting_keeps_files_that_are_not_of_the_data_set(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    tiny = ["--train", "1", "--val", "0", "--testA", "0", "--testB", "0", "--overwrite"]
    assert tool.main(arguments(tmp_path, *tiny)) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [p.name for p in (tmp_path / "annotations").iterdir()] == ["instances_train.json"]


@pytest.mark.parametrize("name", ["images/diary.txt", "annotations/x.json", "instances.json"])
def test_files_of_others_are_not_overwritten(tmp_path, capsys, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    assert tool.main(arguments(tmp_path, "--overwrite")) == 2
    assert f"{path}: this tool did not write it" in capsys.readouterr().err
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_out_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert tool.main(arguments(tmp_path / "file", "--overwrite")) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "384"], "expected WIDTHxHEIGHT"),
        (["--size", "100x100"], "too small"),
        (["--workers", "0"], "at least 1"),
        (["--train", "-1"], "at least 0"),
        (["--seed", "x"], "not an integer"),
    ],
)
def test_bad_arguments(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        tool.main(["--out", str(tmp_path), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
