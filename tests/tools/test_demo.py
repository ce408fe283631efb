"""Tests of the demonstration, with a small model of random weights."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from small_models import build

from vlnms_d2 import VLNMSPredictor

_SPEC = importlib.util.spec_from_file_location(
    "demo", Path(__file__).parents[2] / "tools" / "demo.py"
)
demo = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(demo)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo_model")


@pytest.fixture
def config_file(config, files) -> Path:
    """A config with weights beside it; made once."""
    path = files / "config.yaml"
    if not path.is_file():
        cfg = config()
        torch.save({"model": build(cfg).state_dict()}, files / "weights.pth")
        cfg.MODEL.WEIGHTS = "weights.pth"
        cfg.MODEL.VLNMS.FINAL_SCORE_THRESH = 0.2
        cfg.DATASETS.TEST = ("refshapes_val",)
        path.write_text(cfg.dump())
    return path


@pytest.fixture
def picture_folder(tmp_path) -> Path:
    """Two images of one name, one of a single pixel, and a text file."""
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (60, 80)), ("a.jpg", (50, 40)), ("dot.PNG", (1, 1))):
        cv2.imwrite(str(folder / name), rng.integers(0, 255, (*size, 3), dtype=np.uint8))
    (folder / "notes.txt").write_text("no image")
    (folder / "deeper.png").mkdir()
    return folder


def run(config_file, output, *arguments) -> int:
    return demo.main(["--config-file", str(config_file), "--output", str(output), *arguments])


# --- whole runs --------------------------------------------------------------------------------


def test_own_images_and_queries(config_file, picture_folder, tmp_path, capsys):
    output = tmp_path / "new" / "output"
    queries = ["the red cup", "Привет, мир?", ""]
    asked = [part for query in queries for part in ("--query", query)]
    assert run(config_file, output, "--input", str(picture_folder), *asked) == 0

    names = {path.name for path in output.glob("[!.]*")}
    slugs = ("01_the-red-cup", "02_привет-мир", "03_query")
    pictures = {f"{stem}_{s}.png" for stem in ("a", "a-2", "dot") for s in slugs}
    assert names == pictures | {"proposals.json"}
    for name in pictures:
        assert cv2.imread(str(output / name)).shape[1] > 1280

    images = json.loads((output / "proposals.json").read_text())["images"]
    assert [Path(image["file"]).name for image in images] == ["a.jpg", "a.png", "dot.PNG"]
    assert (images[1]["height"], images[1]["width"]) == (60, 80)
    for image in images:
        assert [record["query"] for record in image["queries"]] == queries
        assert "referent" not in image["queries"][0]
        assert {record["picture"] for record in image["queries"]} <= pictures
    assert images[0]["queries"][1]["words"] == ["привет", "мир"]
    attention = images[0]["queries"][0]["attention"]
    assert len(attention) == 3 and sum(attention) == pytest.approx(1)
    assert "the red cup" in capsys.readouterr().out


def test_the_json_has_what_the_predictor_says(config_file, picture_folder, tmp_path):
    file = picture_folder / "a.png"
    assert run(config_file, tmp_path, "--input", str(file), "--query", "red dog") == 0
    (image,) = json.loads((tmp_path / "proposals.json").read_text())["images"]

    predictor = VLNMSPredictor(demo.setup(config_file, []))
    stock, (aware,) = predictor.compare(cv2.imread(str(file)), "red dog")
    found = image["queries"][0]["proposals"]
    assert 0 < len(found) == len(aware)
    for field, key in (("scores", "s"), ("cls_scores", "c"), ("relatedness", "r")):
        assert [p[key] for p in found] == pytest.approx(aware.get(field).tolist())
    np.testing.assert_allclose([p["box"] for p in found], aware.pred_boxes.tensor, rtol=1e-4)
    assert [p["c"] for p in image["detector"]] == pytest.approx(stock.scores.tolist())
    assert {p["class"] for p in found} <= {"ball", "cup", "key", "tree", "house"}


def test_the_committed_scenes_with_their_questions(config_file, tmp_path, capsys):
    assert run(config_file, tmp_path) == 0
    images = json.loads((tmp_path / "proposals.json").read_text())["images"]
    records = [record for image in images for record in image["queries"]]
    assert len(images) == 3 and len(records) == 9
    assert len(list(tmp_path.glob("*.png"))) == 9
    for image in images:
        assert cv2.imread(image["file"]).shape == (288, 384, 3)
        assert len({tuple(record["referent"]["box"]) for record in image["queries"]}) == 3
        for record in image["queries"]:
            x1, y1, x2, y2 = record["referent"]["box"]
            assert 0 <= x1 < x2 <= 384 and 0 <= y1 < y2 <= 288
    hits = sum(record["referent"]["hit_by_proposals"] for record in records)
    assert f"{hits} with the query" in capsys.readouterr().out


def test_other_queries_about_the_committed_scenes(config_file, tmp_path):
    assert run(config_file, tmp_path, "--masks", "--query", "red cup") == 0
    images = json.loads((tmp_path / "proposals.json").read_text())["images"]
    assert [[r["query"] for r in image["queries"]] for image in images] == [["red cup"]] * 3
    assert all("referent" not in image["queries"][0] for image in images)


def test_damaged_images_are_named_and_the_others_done(
    config_file, picture_folder, tmp_path, capsys
):
    whole = (picture_folder / "a.jpg").read_bytes()
    (picture_folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (picture_folder / "empty.png").touch()
    cv2.imwrite(str(picture_folder / "thin.png"), np.zeros((1, 5000, 3), np.uint8))
    cv2.imwrite(str(picture_folder / "deep.png"), np.full((40, 40), 30_000, np.uint16))
    output = tmp_path / "output"
    status = run(config_file, output, "--input", str(picture_folder), "--query", "cup")
    assert status == 1
    error = capsys.readouterr().err
    assert "4 of 7 files" in error and "cut.jpg" in error and "empty.png" in error
    assert "thin.png: 5000x1 pixels" in error and "deep.png" in error and "than 8 bits" in error
    images = json.loads((output / "proposals.json").read_text())["images"]
    assert len(images) == 3 and len(list(output.glob("*.png"))) == 3


def test_nothing_but_damaged_images(config_file, picture_folder, tmp_path, capsys):
    output, file = tmp_path / "output", str(picture_folder / "notes.txt")
    assert run(config_file, output, "--input", file, "--query", "cup") == 1
    assert not output.exists()
    assert "notes.txt" in capsys.readouterr().err


def test_help_loads_no_heavy_module():
    script = "import runpy, sys; sys.argv[1:] = ['--help']\n"
    script += f"sys.path.insert(0, {str(Path(demo.__file__).parent)!r})\n"
    script += f"try: runpy.run_path({demo.__file__!r}, run_name='__main__')\n"
    script += "except SystemExit: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "--masks" in done.stdout
    heavy = {"torch", "numpy", "cv2", "detectron2", "vlnms_d2"}
    assert not heavy & set(done.stdout.split())


def test_files_of_others_and_inputs_are_not_replaced(config_file, picture_folder, tmp_path, capsys):
    output = tmp_path / "output"
    asked = ["--input", str(picture_folder / "a.png"), "--query", "cup"]
    assert run(config_file, output, *asked) == 0 and run(config_file, output, *asked) == 0
    picture = output / "a_01_cup.png"
    own = ["--input", str(picture), str(picture_folder / "a.png"), "--query", "cup"]
    (output / "a_01_dog.png").write_text("mine")
    for more in (own, [*asked, "--query", "dog"], [*asked[:-1], "dog"]):
        before = {path: path.read_bytes() for path in output.iterdir()}
        with pytest.raises(SystemExit):
            run(config_file, output, *more)
        assert "would be replaced" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in output.iterdir()} == before
        (output / "a_02_dog.png").write_text("mine")
    (output / "proposals.json").write_text("[]")
    with pytest.raises(SystemExit):
        run(config_file, output, *asked)


# --- what the user may get wrong -----------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "{folder}"], '--input needs a question: add --query "the red cup"'),
        (["--input", "{folder}/none.jpg", "--query", "a"], "no such file: {folder}/none.jpg"),
        (["--input", "{folder}/*.bmp", "--query", "a"], "no such file: {folder}/*.bmp"),
        (["--input", "{folder}/deeper", "--query", "a"], ".webp in {folder}/deeper"),
        (["--output", "{folder}/notes.txt"], "notes.txt"),
        (["--opts", "MODEL.NOTHING", "1"], "MODEL.NOTHING"),
        (["--opts", "MODEL.WEIGHTS"], "MODEL.WEIGHTS"),
        (["--opts", "MODEL.WEIGHTS", "gone.pth"], "no weights file 'gone.pth'"),
        (["--opts", "MODEL.WEIGHTS", ""], "tools/train_net.py"),
        (["--opts", "MODEL.VLNMS.VOCAB", "gone.json"], "gone.json"),
        (["--opts", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"], "takes no queries"),
        (["--config-file", "{folder}/gone.yaml"], "gone.yaml"),
    ],
)
def test_errors_say_what_to_do(arguments, message, config_file, picture_folder, tmp_path, capsys):
    arguments = [argument.format(folder=picture_folder) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        run(config_file, tmp_path / "output", *arguments)
    assert stopped.value.code == 2
    assert message.format(folder=picture_folder) in " ".join(capsys.readouterr().err.split())


def test_a_picture_is_written_whole_or_not_at_all(
    config_file, picture_folder, tmp_path, monkeypatch
):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(cv2, "imencode", fail)
    output = tmp_path / "output"
    with pytest.raises(MemoryError):
        run(config_file, output, "--input", str(picture_folder / "a.png"), "--query", "cup")
    assert list(output.glob("[!.]*")) == []


# --- parts -------------------------------------------------------------------------------------


def test_images_are_found_once_in_order(picture_folder, monkeypatch):
    monkeypatch.chdir(picture_folder)
    found = demo.find_images(["dot.PNG", "a.*", "."])
    assert [path.name for path in found] == ["dot.PNG", "a.jpg", "a.png"]
    (picture_folder / "b[1].png").touch()
    assert [path.name for path in demo.find_images(["b[1].png"])] == ["b[1].png"]


def test_names_of_pictures_differ():
    paths = [Path("x/a.png"), Path("y/a.png"), Path("a-2.png"), Path("z/a.jpg")]
    stems = [job.stem for job in demo.make_jobs(paths, ["q"])]
    assert len(set(stems)) == 4 and stems[0] == "a"


@pytest.mark.parametrize(
    "query, expected",
    [("Red/../cup!", "red-cup"), ("", "query"), ("?!", "query"), ("naïve chat", "naïve-chat")],
)
def test_slugs(query, expected):
    assert demo.slug(query) == expected
    assert len(demo.slug("word " * 100)) <= 40


# --- records and table -------------------------------------------------------------------------

CLASSES = ("cup", "chair", "dog")
LEFT_BOX, RIGHT_BOX, LOW_BOX = (5, 20, 25, 40), (50, 20, 70, 40), (30, 44, 40, 56)


def proposals(boxes, *, query: bool) -> Instances:
    n = len(boxes)
    instances = Instances((60, 80))
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
    instances.scores = torch.linspace(0.9, 0.2, n)
    instances.pred_classes = torch.arange(n)
    if query:
        instances.cls_scores = torch.linspace(0.95, 0.4, n)
        instances.relatedness = torch.linspace(0.99, 0.5, n)
    return instances


def test_a_query_record_judges_both_sides_by_as_many_proposals():
    detector = proposals([LEFT_BOX, RIGHT_BOX], query=False)
    aware = proposals([RIGHT_BOX], query=True)
    attention = np.array([[0.25, 0.75]])
    record = demo.query_record(
        "Red cup", ["red", "cup"], attention, detector, aware, CLASSES, RIGHT_BOX
    )
    verdict = {"hit_by_detector": False, "hit_by_proposals": True}
    assert record["referent"] == verdict | {"box": list(RIGHT_BOX)}
    assert record["attention"] == [0.25, 0.75] and record["words"] == ["red", "cup"]
    (proposal,) = record["proposals"]
    assert proposal["box"] == list(RIGHT_BOX) and proposal["class"] == "cup"
    assert [proposal[key] for key in "scr"] == pytest.approx([0.9, 0.95, 0.99])
    assert "referent" not in demo.query_record("a", ["a"], None, detector, aware, CLASSES)


def test_the_table_counts_hits():
    detector = proposals([LEFT_BOX, RIGHT_BOX], query=False)
    records = [
        demo.query_record(
            text, ["a"], None, detector, proposals(boxes, query=True), CLASSES, RIGHT_BOX
        )
        for text, boxes in (("first\nline", [RIGHT_BOX]), ("007", [LEFT_BOX, LOW_BOX]))
    ]
    text = demo.result_table([{"file": "folder/one.jpg", "queries": records}])
    first, second = (line.split() for line in text.splitlines()[3:5])
    assert first == ["one.jpg", "first", "line", "1", "cup", ".90", "no", "yes"]
    assert second == ["one.jpg", "007", "2", "cup", ".90,", "chair", ".20", "yes", "no"]
    assert "1 of 2 by the detector alone, 1 with the query" in text


def test_the_table_without_truth_has_no_verdicts():
    record = demo.query_record("a " * 300, [], None, *[proposals([], query=True)] * 2, CLASSES)
    text = demo.result_table([{"file": "one.jpg", "queries": [record]}])
    assert "finds" not in text and max(map(len, text.splitlines())) < 120
    assert "image" in demo.result_table([{"file": "one.jpg", "queries": []}])
