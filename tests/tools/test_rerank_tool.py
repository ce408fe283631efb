"""tools/rerank.py: from a results file and queries to what second stages read."""

import importlib.util
import json
import os
import pickle
import signal

import cv2
import numpy as np
import pytest
from conftest import REPO
from killing import exit_code

import vlnms_d2
from reranking import job as rerank_job
from reranking import worker
from reranking.recall import METHODS, recall_of_mentions
from reranking.worker import Reranker
from vlnms_d2.evaluation.matching import Match
from vlnms_d2.export import FORMATS, job

_SPEC = importlib.util.spec_from_file_location("rerank_tool", REPO / "tools" / "rerank.py")
rerank_tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(rerank_tool)

NAMES = {2: "cat", 7: "dog", 9: "cup"}
FILES = [one.output for one in FORMATS.values()]
OUTPUT = [*FILES, "manifest.json"]

WITHOUT_DETECTIONS, WITHOUT_QUERIES = 7, 50


def by_words(names):
    """In place of the language: a text is about the categories whose names are in it."""

    def encode(texts):
        rows = np.array([[name in text.split() for name in names] for text in texts])
        silent = ~rows.any(axis=1, keepdims=True)
        return np.where(rows | silent, 1.0, 0.1).astype(np.float32)

    return encode


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(worker, "category_relatedness", by_words)
    monkeypatch.setattr(worker, "TEXTS_PER_FILE", 2)
    monkeypatch.setattr(rerank_job, "IMAGES_PER_BLOCK", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven images of one to three captions, six with detections, in no order."""
    path = tmp_path_factory.mktemp("rerank")
    rng = np.random.default_rng(0)
    results, captions, annotations, mentions = [], [], [], []
    for image_id in (1, 2, 3, 4, 5, 6, WITHOUT_QUERIES):
        for _ in range(12):
            results.append(
                {
                    "image_id": image_id,
                    "category_id": int(rng.choice([2, 7, 9])),
                    "bbox": rng.uniform(5, 30, 4).round(1).tolist(),
                    "score": round(float(rng.random()), 4),
                }
            )
    rng.shuffle(results)
    texts = ["a dog", "the cat and the cup", "nothing to see", "a dog", ""]
    for image_id in (4, 1, 2, 6, 3, 5, WITHOUT_DETECTIONS):
        annotations.append(
            {"id": image_id * 10, "image_id": image_id, "category_id": 7, "bbox": [10, 10, 20, 20]}
        )
        for _ in range(int(rng.integers(1, 4))):
            caption_id = len(captions) + 100
            text = texts[caption_id % 5]
            captions.append({"image_id": image_id, "id": caption_id, "caption": text})
            if "dog" in text:
                mentions.append({"caption_id": caption_id, "annotation_ids": [image_id * 10]})
    images = [
        {"id": i, "file_name": f"{i}.png", "height": 60, "width": 70}
        for i in (1, 2, 3, 4, 5, 6, WITHOUT_DETECTIONS)
    ]
    categories = [{"id": i, "name": name} for i, name in NAMES.items()]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    for image in images:
        cv2.imwrite(str(path / image["file_name"]), np.full((60, 70, 3), 128, np.uint8))
    for name, content in (
        ("results", results),
        ("captions", {"annotations": captions}),
        ("instances", instances),
        ("mentions", mentions),
    ):
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def arguments(folder, out, *more, **inputs) -> list[str]:
    given = {"detections": "results.json", "annotations": "instances.json"}
    given |= {"queries": "captions.json"} | inputs
    words = [word for key, name in given.items() for word in (f"--{key}", str(folder / name))]
    return [*words, "--out", str(out), *more]


def run(folder, out, *more, status=0, **inputs):
    assert rerank_tool.main(arguments(folder, out, *more, **inputs)) == status
    return out


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text())


ALL = ["--format", *FORMATS]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The output of an unbroken run of all formats in one process."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "category_relatedness", by_words)
        patch.setattr(worker, "TEXTS_PER_FILE", 2)
        patch.setattr(rerank_job, "IMAGES_PER_BLOCK", 2)
        return run(folder, out, *ALL, "--mentions", str(folder / "mentions.json"))


def check_same(out, whole):
    assert sorted(path.name for path in out.iterdir()) == sorted(OUTPUT)
    for name in OUTPUT:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_the_defaults_are_those_of_the_package(folder, tmp_path):
    args = rerank_tool.parse_args(arguments(folder, tmp_path))
    assert args.nms_thresh == worker.NMS_THRESH and worker.TOP_N == 100


def test_it_is_what_the_function_gives(folder, whole):
    results, captions = read(folder / "results.json"), read(folder / "captions.json")
    lines = read(whole / "proposals.jsonl")
    ids = {entry["id"] for entry in captions["annotations"]}
    assert {line["query_id"] for line in lines} == ids and len(lines) == len(ids)
    assert [line["image_id"] for line in lines] == sorted(line["image_id"] for line in lines)
    names, ids = list(NAMES.values()), list(NAMES)
    for line in lines:
        own = [entry for entry in results if entry["image_id"] == line["image_id"]]
        boxes = np.array([entry["bbox"] for entry in own]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        classes = np.array([ids.index(entry["category_id"]) for entry in own], dtype=np.int64)
        [expected] = vlnms_d2.rerank(
            boxes, [entry["score"] for entry in own], classes, names, [line["query"]],
            relatedness=by_words(names)([line["query"]])[:, classes],
        )  # fmt: skip
        found = line["proposals"]
        assert [one["class"] for one in found] == [names[c] for c in expected.pred_classes]
        assert [one["c"] for one in found] == [own[i]["score"] for i in expected.candidate_index]
        assert np.float32([one["s"] for one in found]).tolist() == expected.scores.tolist()
        shown = np.reshape([one["box"] for one in found], (-1, 4))
        assert np.allclose(shown, boxes[expected.candidate_index])
    coco = read(whole / "results.json")
    assert len(coco) == sum(len(line["proposals"]) for line in lines)
    assert all(entry["bbox"] in [r["bbox"] for r in results] for entry in coco)
    assert len(read(whole / "per_expression_dets.json")) == len(coco)
    of_image = {(entry["image_id"], *entry["box"]) for entry in read(whole / "mattnet_dets.json")}
    assert of_image == {(entry["image_id"], *entry["bbox"]) for entry in coco}


def test_the_manifest_says_what_was_made_of_what(folder, whole):
    manifest = read(whole / "manifest.json")
    identity, counts = manifest["identity"], manifest["counts"]
    for role, name in (("detections", "results.json"), ("mentions", "mentions.json")):
        digest = job.sha256_of(folder / name)
        assert identity["inputs"][role] == {"name": name, "sha256": digest}
    assert identity["settings"]["top_n"] == 100 and manifest["threshold"] is None
    assert identity["versions"]["vlnms_d2"] == vlnms_d2.__version__
    assert {name: job.sha256_of(whole / name) for name in FILES} == manifest["outputs"]
    captions = read(folder / "captions.json")["annotations"]
    without = [c for c in captions if c["image_id"] == WITHOUT_DETECTIONS]
    assert without
    expected = {
        "images": 7,
        "queries": len(captions),
        "distinct_texts": 4,
        "distinct_texts_without_category": 2,
        "images_without_detections": 1,
        "queries_without_detections": len(without),
        "images_without_queries": 1,
        "detections": 84,
        "detections_without_queries": 12,
        "detections_of_zero_area": 0,
        "queries_with_mentions": len(read(folder / "mentions.json")),
        "proposals": len(read(whole / "results.json")),
    }
    assert expected.items() <= counts.items()


def test_three_processes_give_the_same_bytes(folder, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "TEXTS_PER_FILE", 1024)  # as it is in the processes
    more = ["--mentions", str(folder / "mentions.json"), "--processes", "3"]
    check_same(run(folder, tmp_path / "out", *ALL, *more), whole)


def cut_off(monkeypatch, owner, name, after):
    """The method raises at its call number `after`, counted from 0."""
    method, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        (rerank_job.DetectionStore, "build", 0),
        (worker.np, "save", 1),
        (Reranker, "write", 2),
        (Reranker, "_matches", 3),
        (type(FORMATS["coco"]), "merge", 0),
        (job.OutputFolder, "publish", 2),
        (job.OutputFolder, "finish", 0),
    ],
)
def test_what_was_cut_off_is_gone_on_with(folder, whole, tmp_path, monkeypatch, owner, name, after):
    more = [*ALL, "--mentions", str(folder / "mentions.json")]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        cut_off(patch, owner, name, after)
        with pytest.raises(KeyboardInterrupt):
            run(folder, out, *more)
    assert not (out / "manifest.json").exists()
    done = []
    write = Reranker.write
    monkeypatch.setattr(
        Reranker, "write", lambda self, blocks: done.append(blocks[0].number) or write(self, blocks)
    )
    check_same(run(folder, out, *more), whole)
    if name == "write":
        assert done == [2, 3]
    elif owner is not Reranker:
        assert done == ([] if name in ("merge", "publish", "finish") else [0, 1, 2, 3])


def run_killed(arguments):
    """The tool, killed in the middle of a block."""
    worker.category_relatedness, worker.TEXTS_PER_FILE = by_words, 2
    rerank_job.IMAGES_PER_BLOCK = 2
    write, calls = Reranker.write, []

    def killed(self, blocks):
        calls.append(blocks)
        if len(calls) == 3:
            Reranker._matches = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        write(self, blocks)

    Reranker.write = killed
    rerank_tool.main(arguments)


def test_a_killed_run_goes_on_with_nothing_lost_or_doubled(folder, whole, tmp_path):
    out = tmp_path / "out"
    more = [*ALL, "--mentions", str(folder / "mentions.json")]
    assert exit_code(run_killed, arguments(folder, out, *more)) == -signal.SIGKILL
    shards = {path.name for path in (out / ".work" / "shards").iterdir()}
    assert {"000000.counts", "000001.counts"} <= shards and "000002.counts" not in shards
    check_same(run(folder, out, *more), whole)


def test_what_is_finished_is_not_made_again(folder, whole, tmp_path, monkeypatch, capsys):
    mentions = ["--mentions", str(folder / "mentions.json")]
    out = run(folder, tmp_path / "out", *ALL, *mentions)
    first = capsys.readouterr().out
    monkeypatch.setattr(Reranker, "write", None)
    check_same(run(folder, out, *ALL, *mentions), whole)
    again = capsys.readouterr().out
    assert again == first and "word oracle" in again


def test_other_settings_need_another_folder_or_overwrite(folder, tmp_path, capsys):
    out = run(folder, tmp_path / "out", "--format", "coco")
    run(folder, out, "--top-n", "1", status=1)
    error = capsys.readouterr().err
    assert "holds a run of other input or settings (settings." in error and "--overwrite" in error
    (out / "mine.txt").write_text("not the tool's")
    run(folder, out, "--top-n", "1", "--overwrite")
    assert {path.name for path in out.iterdir()} == {"proposals.jsonl", "manifest.json", "mine.txt"}
    assert all(len(line["proposals"]) <= 1 for line in read(out / "proposals.jsonl"))


def test_unfinished_work_of_other_input_is_not_gone_on_with(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        cut_off(patch, Reranker, "write", 2)
        with pytest.raises(KeyboardInterrupt):
            run(folder, out)
    run(folder, out, "--nms-thresh", "0.3", status=1)
    assert "settings.nms_thresh is 0.5 there, 0.3 now" in capsys.readouterr().err
    run(folder, out, "--nms-thresh", "0.3", "--overwrite")
    clean = run(folder, tmp_path / "clean", "--nms-thresh", "0.3")
    assert (out / "proposals.jsonl").read_bytes() == (clean / "proposals.jsonl").read_bytes()


def test_two_runs_do_not_share_a_folder(folder, tmp_path, capsys):
    output = job.OutputFolder(tmp_path / "out")
    with output.begin({}):
        run(folder, tmp_path / "out", status=1)
        assert "another process is at work" in capsys.readouterr().err


def test_cuts(folder, tmp_path):
    every = read(run(folder, tmp_path / "all", "--score-thresh", "0") / "proposals.jsonl")
    top = read(run(folder, tmp_path / "top", "--top-n", "3") / "proposals.jsonl")
    assert [line["proposals"] for line in top] == [line["proposals"][:3] for line in every]
    cut = read(run(folder, tmp_path / "cut", "--score-thresh", "0.5") / "proposals.jsonl")
    for line, full in zip(cut, every, strict=True):
        above = [one for one in full["proposals"] if one["s"] > 0.5]
        assert line["proposals"] == (above or full["proposals"][:1])


@pytest.mark.parametrize("mean", [1, 2.5, 4, 99])
def test_a_mean_number_of_proposals(folder, tmp_path, mean):
    every = read(run(folder, tmp_path / "all", "--score-thresh", "0") / "proposals.jsonl")
    out = run(folder, tmp_path / "mean", "--mean-proposals", str(mean))
    lines = read(out / "proposals.jsonl")
    threshold = read(out / "manifest.json")["threshold"]
    answered = [line["proposals"] for line in lines if line["proposals"]]
    wanted = mean * len(answered)
    total = sum(map(len, answered))
    others = np.float32([p["s"] for line in every for p in line["proposals"][1:]])
    possible = [len(answered) + (others > t).sum() for t in [-1, *others]]
    assert abs(total - wanted) == np.abs(np.array(possible) - wanted).min()
    again = run(folder, tmp_path / "again", "--score-thresh", repr(max(threshold, 0)))
    assert (again / "proposals.jsonl").read_bytes() == (out / "proposals.jsonl").read_bytes()


def test_recall_is_printed(folder, tmp_path, capsys):
    run(folder, tmp_path / "out", "--mentions", str(folder / "mentions.json"))
    printed = capsys.readouterr().out
    for word in ("detector alone", "Category", "word oracle", "N=5", "mean 8"):
        assert word in printed


def test_pictures(folder, tmp_path):
    out = run(folder, tmp_path / "out", "--image-dir", str(folder), "--pictures", "3")
    pictures = sorted((out / "pictures").iterdir())
    assert len(pictures) == 3 and read(out / "manifest.json")["pictures"] == 3
    for path in pictures:
        drawn = cv2.imread(str(path))
        assert drawn.shape[1] > 1200 and drawn.std() > 10


def test_a_missing_picture_is_noticed_before_the_work(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Reranker, "write", None)
    run(folder, tmp_path / "out", "--image-dir", str(tmp_path), "--pictures", "1", status=1)
    assert "4.png" in (error := capsys.readouterr().err) and "no image file" in error


def test_refer_and_flickr30k_and_json_lines(folder, tmp_path):
    refs = [
        {"ref_id": 5, "image_id": 2, "split": split, "sentences": [{"sent_id": i, "sent": "a dog"}]}
        for i, split in enumerate(["val", "testA"])
    ]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs))
    out = run(
        folder, tmp_path / "refer", "--split", "val", "--format", "per-expression",
        queries="refs(unc).p",
    )  # fmt: skip
    found = read(out / "per_expression_dets.json")
    assert found and all((e["ref_id"], e["sent_id"], e["split"]) == (5, 0, "val") for e in found)

    (folder / "Sentences").mkdir()
    (folder / "Sentences" / "3.txt").write_text("A [/EN#1/animals dog] .\n")
    out = run(folder, tmp_path / "flickr", queries="Sentences")
    [line] = read(out / "proposals.jsonl")
    assert (line["image_id"], line["query_id"], line["query"]) == (3, "3#0", "A dog .")
    before = read(out / "manifest.json")["identity"]["inputs"]["queries"]["sha256"]
    (folder / "Sentences" / "3.txt").write_text("A [/EN#1/animals cat] .\n")
    assert job.sha256_of(folder / "Sentences") != before

    (folder / "q.jsonl").write_text('{"image_id": 1, "query_id": "x", "query": "cup"}\n')
    [line] = read(run(folder, tmp_path / "lines", queries="q.jsonl") / "proposals.jsonl")
    assert line["query_id"] == "x"


def test_a_detector_that_finds_nothing_anywhere(folder, tmp_path, caplog):
    (folder / "none.json").write_text("[]")
    out = run(folder, tmp_path / "out", *ALL, "--mean-proposals", "8", detections="none.json")
    assert all(line["proposals"] == [] for line in read(out / "proposals.jsonl"))
    assert read(out / "results.json") == [] and read(out / "mattnet_dets.json") == []
    counts = read(out / "manifest.json")["counts"]
    assert counts["queries_without_detections"] == counts["queries"] and not counts["proposals"]
    [warning] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "7 of the 7 images with queries have no detections" in warning.getMessage()


def test_a_query_of_an_unknown_image_is_named(folder, tmp_path, capsys):
    (folder / "q.jsonl").write_text('{"image_id": 999, "query_id": "x", "query": "cup"}\n')
    run(folder, tmp_path / "out", queries="q.jsonl", status=1)
    error = capsys.readouterr().err
    assert "query 'x' is of image 999, which is neither in" in error


def test_a_results_file_cut_off_in_the_middle(folder, tmp_path, capsys):
    text = (folder / "results.json").read_text()
    (folder / "cut.json").write_text(text[: len(text) // 2])
    run(folder, tmp_path / "out", detections="cut.json", status=1)
    error = capsys.readouterr().err
    assert "cut.json: not valid JSON" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    (folder / "cut.json").write_text(text)  # made again
    run(folder, tmp_path / "out", detections="cut.json")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--top-n", "0"], "top_n is 0, expected a number at least 1"),
        (["--score-thresh", "1.5"], "score_thresh is 1.5"),
        (["--score-thresh", "nan"], "score_thresh is nan"),
        (["--mean-proposals", "0.5"], "mean_proposals is 0.5"),
        (["--nms-thresh", "-1"], "nms_thresh is -1"),
        (["--format", "coco", "coco"], "formats are coco, coco, expected"),
        (["--pictures", "3"], "go together"),
        (["--processes", "0"], "processes is 0"),
        (["--split", "val"], "no query is of the split 'val'"),
        (["--mentions", "no.json"], "no.json: no such file, expected the mentions"),
    ],
)
def test_wrong_settings(folder, tmp_path, capsys, more, message):
    run(folder, tmp_path / "out", *more, status=1)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_cuts_at_once_are_refused(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(folder, tmp_path, "--top-n", "3", "--score-thresh", "0.1")
    assert "not allowed with" in capsys.readouterr().err


def test_input_photos_where_the_pictures_would_go_stay(folder, tmp_path, capsys):
    out = tmp_path / "c2"
    (out / "pictures").mkdir(parents=True)
    for path in folder.glob("*.png"):
        (out / "pictures" / path.name).write_bytes(path.read_bytes())
    photos = sorted(path.name for path in (out / "pictures").iterdir())
    for more in ([], ["--overwrite"]):
        pictures = ["--image-dir", str(out / "pictures"), "--pictures", "2", *more]
        run(folder, out, *pictures, status=1)
        assert "1.png: this tool did not write it, and would replace it" in capsys.readouterr().err
        assert sorted(path.name for path in (out / "pictures").iterdir()) == photos
        assert [path.name for path in out.iterdir()] == ["pictures"]


def test_earlier_output_that_is_the_input_of_an_overwrite_stays(folder, tmp_path, capsys):
    out = run(folder, tmp_path / "out", "--format", "coco")
    content = (out / "results.json").read_bytes()
    run(folder, out, "--overwrite", detections=out / "results.json", status=1)
    assert "results.json: is an input and would be replaced" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == content and (out / "manifest.json").exists()


def test_overwriting_with_a_damaged_file_keeps_the_finished_output(folder, tmp_path, capsys):
    out = run(folder, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (folder / "cut.json").write_text((folder / "results.json").read_text()[:-100])
    run(folder, out, "--overwrite", detections="cut.json", status=1)
    assert "cut.json: not valid JSON" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_table_of_recall():
    one = [Match(np.float32([1.0]), None, np.int32([0]))]
    results = recall_of_mentions(dict.fromkeys(METHODS, one))
    text = rerank_tool.format_recall(results)
    for word in ("N=5", "N=10", "mean 3", "mean 8", *METHODS.values(), "100.00", "1 captions"):
        assert word in text


@pytest.mark.parametrize("images", [True, False])
def test_portable_is_what_the_function_gives_in_any_number_of_processes(folder, tmp_path, images):
    """With --image-dir also the colours count; nothing is drawn."""
    queries = [
        {"image_id": image_id, "query_id": f"{image_id}/{text}", "query": text}
        for image_id in (2, WITHOUT_DETECTIONS)
        for text in ("left grey dog", "second cat from the right", "")
    ]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    options = ["--relatedness", "Portable", *(["--image-dir", str(folder)] if images else [])]
    given = {"queries": str(tmp_path / "queries.jsonl")}
    one = run(folder, tmp_path / "one", *options, **given)
    two = run(folder, tmp_path / "two", *options, "--processes", "2", **given)
    lines = read(one / "proposals.jsonl")
    assert lines == read(two / "proposals.jsonl") and not (one / "pictures").exists()
    results, ids = read(folder / "results.json"), list(NAMES)
    for line in lines:
        detections = [entry for entry in results if entry["image_id"] == line["image_id"]]
        boxes = np.array([entry["bbox"] for entry in detections]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        [expected] = vlnms_d2.rerank(
            boxes,
            [entry["score"] for entry in detections],
            np.array([ids.index(entry["category_id"]) for entry in detections], dtype=np.int64),
            list(NAMES.values()),
            [line["query"]],
            relatedness="Portable",
            image_size=(60, 70),
            image=cv2.imread(str(folder / "2.png")) if images else None,
        )
        assert np.allclose([p["s"] for p in line["proposals"]], expected.scores, atol=1e-6)
        assert len(line["proposals"]) == (len(expected) if line["image_id"] == 2 else 0)


def test_portable_names_the_image_that_it_lacks(folder, tmp_path, capsys):
    options = ["--relatedness", "Portable", "--image-dir", str(tmp_path)]
    run(folder, tmp_path / "out", *options, status=1)
    assert "1.png" in capsys.readouterr().err
