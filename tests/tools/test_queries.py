"""Queries from the files of four formats."""

import json
import pickle

import pytest

from reranking.queries import Query, read_queries

REFS = [
    {
        "ref_id": 5,
        "ann_id": 70,
        "image_id": 2,
        "split": "val",
        "sentences": [
            {"sent_id": 9, "sent": "red  cup", "raw": "Red cup!"},
            {"sent_id": 8, "sent": "", "raw": "the cup"},
        ],
    },
    {
        "ref_id": 6,
        "ann_id": 71,
        "image_id": 1,
        "split": "testA",
        "sentences": [{"sent_id": 7, "raw": " "}],
    },
]
CAPTIONS = {
    "images": [],
    "annotations": [
        {"image_id": 4, "id": 12, "caption": "A dog\nruns. "},
        {"image_id": 3, "id": 11, "caption": ""},
    ],
}


def put(path, content):
    if path.suffix == ".p":
        path.write_bytes(pickle.dumps(content, protocol=2))
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(entry)}\n" for entry in content))
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_coco_captions(tmp_path):
    assert read_queries(put(tmp_path / "captions.json", CAPTIONS)) == [
        Query(4, 12, "A dog runs."),
        Query(3, 11, ""),
    ]


def test_json_lines(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"image_id": 3, "query_id": "a", "query": "à gauche"}\n\n'
        '{"image_id": 3, "query_id": 0, "query": "x", "more": 1}'
    )
    assert read_queries(path) == [Query(3, "a", "à gauche"), Query(3, 0, "x")]


def test_refer(tmp_path):
    path = put(tmp_path / "refs(unc).p", REFS)
    val = [Query(2, 9, "red cup", 5, "val"), Query(2, 8, "the cup", 5, "val")]
    assert read_queries(path) == [*val, Query(1, 7, "", 6, "testA")]
    assert read_queries(path, "val") == val
    with pytest.raises(ValueError, match=r"no query is of the split 'testB'.*: testA, val"):
        read_queries(path, "testB")


@pytest.mark.parametrize("name", ["Sentences", "texts"])
def test_flickr30k_entities(tmp_path, name):
    folder = tmp_path / "flickr" / name
    folder.mkdir(parents=True)
    (folder / "100.txt").write_text("[/EN#1/people Two men] walk .\n[/EN#0/notvisual who] talk\n")
    (folder / "36.txt").write_text("A [/EN#2/animals dog] .\n")
    asked = folder if name == "texts" else folder.parent
    assert read_queries(asked) == [
        Query(36, "36#0", "A dog ."),
        Query(100, "100#0", "Two men walk ."),
        Query(100, "100#1", "who talk"),
    ]


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_a_pickle_that_runs_something_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="refused, as it asks for"):
        read_queries(put(tmp_path / "refs.p", [Evil()]))
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"annotations": [{"image_id', r"a.json: not valid JSON.*cut short"),
        ("a.json", {"images": []}, "a.json has no 'annotations'"),
        ("a.json", {"annotations": []}, "a.json: there are no queries"),
        ("a.json", {"annotations": [{"image_id": 1, "id": 2}]}, "number 0 has no 'caption'"),
        ("a.json", {"annotations": [{"image_id": "1", "id": 2, "caption": ""}]}, "'1', expected"),
        ("a.json", {"annotations": CAPTIONS["annotations"] * 2}, "number 2: the id 12 is used tw"),
        ("a.jsonl", [{"image_id": 1, "query": "a"}], "line 1: 'query_id' is None, expected an int"),
        ("a.jsonl", [{"image_id": 1, "query_id": True, "query": "a"}], "'query_id' is True"),
        ("a.jsonl", [{"image_id": 1, "query_id": 1, "query": None}], "line 1: 'query' is None"),
        ("a.jsonl", [3], "line 1 is int"),
        ("a.jsonl", [], "there are no queries"),
        ("a.p", {"refs": []}, "expected a list of refs, found dict"),
        ("a.p", [{"ref_id": 1}], "ref number 0 has no 'image_id'"),
        ("a.p", [REFS[0] | {"sentences": [{"sent": "a"}]}], "sentence number 0 has no 'sent_id'"),
        ("a.txt", "two men", "the suffix '.txt' is unknown.*JSON lines"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_queries(put(tmp_path / name, content))


def test_a_line_cut_off_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"image_id": 1, "query_id": 1, "query": "a"}\n{"image_id": 1, "que')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: not valid JSON.*cut short"):
        read_queries(path)


def test_folders_without_sentences_and_with_strangers(tmp_path):
    with pytest.raises(ValueError, match=r"no <image id>.txt in this folder"):
        read_queries(tmp_path)
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(ValueError, match=r"notes.txt: expected <image id>.txt"):
        read_queries(tmp_path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.p", "folder"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
        read_queries(tmp_path / name)
