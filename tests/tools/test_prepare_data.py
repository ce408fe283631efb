"""tools/prepare_data.py: from folders in the real formats to what training on them needs."""

import json

import pytest
from dataset_folders import (
    COCO_IDS,
    make_coco_annotations,
    make_flickr30k_entities_folder,
    make_karpathy_folder,
    make_refer_folder,
)
from detectron2.data import DatasetCatalog, MetadataCatalog

import prepare_data
from preparation import GAMMA_GLOVE, GAMMA_MINILM, Preparation, Settings
from vlnms_d2.data import register_all
from vlnms_d2.data.pseudo_gt import load_expressions
from vlnms_d2.language.word_vectors import read_word_vectors
from vlnms_d2.modeling.text import Vocabulary

PREFIX = "prepared_"
TRAIN, VAL = f"{PREFIX}refcoco_unc_train", f"{PREFIX}refcoco_unc_val"


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    make_refer_folder(root)
    make_flickr30k_entities_folder(root)
    make_karpathy_folder(root, "flickr30k")
    make_karpathy_folder(root, "coco")
    make_coco_annotations(root)
    register_all(root, prefix=PREFIX)
    yield root
    for name in [name for name in DatasetCatalog.list() if name.startswith(PREFIX)]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="module")
def glove(tmp_path_factory) -> str:
    """Vectors by which "cup" is a cup, "dog" a dog, and nothing else anything."""
    path = tmp_path_factory.mktemp("vectors") / "glove.txt"
    path.write_text("cup 1 0 0\ndog 0 2 0\nred 0 0 1\n. . 0 0 1\n")
    return str(path)


@pytest.fixture
def prepare(datasets, glove, tmp_path):
    """Runs the tool with its output in a folder of the test; returns that folder."""

    def run(*args: str, status: int = 0):
        options = ["--out", str(tmp_path / "out"), "--word-vectors", glove]
        assert prepare_data.main([*options, *args]) == status
        return tmp_path / "out"

    return run


def read(path):
    return json.loads(path.read_text())


def test_contexts_vocabulary_vectors_and_statistics(prepare):
    out = prepare("--vocab-min-count", "1", "--datasets", TRAIN, VAL)
    images = load_expressions([TRAIN, VAL], out, required=True)
    assert len(images) == 3
    contexts = set()
    for image in images:
        names = MetadataCatalog.get(TRAIN).thing_classes
        class_of = {a["id"]: names[a["category_id"]] for a in image["annotations"]}
        for expression in image["expressions"]:
            noun = {"the red cup": "cup", "dog à gauche": "dog"}[expression["query"]]
            expected = {i for i, name in class_of.items() if name == noun}
            assert set(expression["context_ann_ids"]) == expected - {expression["ann_id"]}
            contexts |= {class_of[i] for i in expression["context_ann_ids"]}
    assert contexts  # or nothing was tested
    vocabulary = Vocabulary.load(out / TRAIN / "vocab.json")
    assert set(vocabulary.words[2:]) == {"the", "red", "cup", "dog", "à", "gauche"}
    assert not (out / VAL / "vocab.json").exists()
    vectors = read_word_vectors(out / TRAIN / "word_vectors.txt", vocabulary.words, 3)
    assert {word: v.tolist() for word, v in vectors.items()} == {
        "cup": [1, 0, 0], "dog": [0, 2, 0], "red": [0, 0, 1],
    }  # fmt: skip
    for name, images in ((TRAIN, 2), (VAL, 1)):
        statistics = read(out / name / "statistics.json")
        assert (statistics["images"], statistics["expressions"]) == (images, 2 * images)
        assert statistics["words_per_expression"] == 3 and statistics["unknown_words"] == 0
        assert 0 <= statistics["referent_misses"] <= 1
        assert statistics["contexts"] == "text similarity"


def test_existing_files_are_not_written_again_unless_the_settings_differ(
    prepare, capsys, monkeypatch
):
    out = prepare("--datasets", TRAIN)
    path = out / TRAIN / "pseudo_gt.json"
    first = path.read_bytes()
    made = []
    make = Preparation._make_pseudo_gt
    monkeypatch.setattr(
        Preparation, "_make_pseudo_gt", lambda *args: made.append(make(*args)) or None
    )
    capsys.readouterr()
    prepare("--datasets", TRAIN)
    assert not made and path.read_bytes() == first
    assert "up to date" in capsys.readouterr().out
    prepare("--datasets", TRAIN, "--gamma", "0.99")
    assert len(made) == 1 and "settings have changed" in capsys.readouterr().out
    prepare("--datasets", TRAIN, "--gamma", "0.99", "--redo")
    assert len(made) == 2


def test_an_interrupted_step_runs_again(prepare, monkeypatch):
    def cut_off(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("preparation.save_pseudo_gt", cut_off)
        with pytest.raises(KeyboardInterrupt):
            prepare("--datasets", TRAIN)
    out = prepare("--datasets", TRAIN)
    assert read(out / TRAIN / "pseudo_gt.json")["dataset"] == TRAIN


def test_boxes_of_a_detector_in_place_of_annotated_ones(prepare, tmp_path):
    images = DatasetCatalog.get(TRAIN)
    image_id = images[0]["image_id"]
    results = [
        {"image_id": image_id, "category_id": 5, "bbox": [1, 2, 3, 4], "score": 0.9},
        {"image_id": image_id, "category_id": 9, "bbox": [5, 6, 7, 8], "score": 0.8},
        {"image_id": image_id, "category_id": 5, "bbox": [0, 0, 9, 9], "score": 0.09},
    ]
    categories = {"categories": [{"id": 5, "name": "cup"}, {"id": 9, "name": "dog"}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    detector = ["--detections", str(tmp_path / "results.json")]
    detector += ["--categories", str(tmp_path / "categories.json")]
    out = prepare("--datasets", TRAIN, *detector)
    boxes = {"the red cup": [[1, 2, 3, 4]], "dog à gauche": [[5, 6, 7, 8]]}
    for image in load_expressions([TRAIN], out):
        for expression in image["expressions"]:
            expected = boxes[expression["query"]] if image["image_id"] == image_id else []
            assert expression["pseudo_boxes"] == expected
    assert read(out / TRAIN / "statistics.json")["contexts"] == "WSPG"


def test_data_sets_with_annotated_contexts_need_none_made(prepare):
    name = f"{PREFIX}flickr30k_entities_captions_train"
    out = prepare("--datasets", name)
    assert read(out / name / "statistics.json")["contexts"] == "annotated"
    assert not (out / name / "pseudo_gt.json").exists()


def test_captions_without_any_box_need_a_detector(prepare, capsys):
    prepare("--datasets", f"{PREFIX}flickr30k_captions_train", status=1)
    assert "no annotated objects" in capsys.readouterr().err


def test_a_missing_file_is_one_sentence_that_says_where_to_get_it(datasets, prepare, capsys):
    refs = datasets / "refer" / "refcoco" / "refs(google).p"
    content = refs.read_bytes()
    refs.unlink()
    try:
        prepare("--datasets", f"{PREFIX}refcoco_google_train", status=1)
    finally:
        refs.write_bytes(content)
    error = capsys.readouterr().err
    assert (
        "refs(google).p: no such file" in error and "https://github.com/lichengunc/refer" in error
    )
    assert error.count("\n") == 1


def test_a_missing_image_is_one_sentence_that_says_where_to_get_it(datasets, prepare, capsys):
    picture = next((datasets / "coco" / "train2014").iterdir())
    moved = picture.rename(picture.with_suffix(".gone"))
    splits = [f"{PREFIX}refcoco_unc_{split}" for split in ("train", "val", "testA", "testB")]
    try:
        prepare("--datasets", *splits, status=1)
    finally:
        moved.rename(picture)
    error = capsys.readouterr().err
    assert picture.name in error and "https://cocodataset.org" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--datasets", "no_such_set"], "no such data set: no_such_set"),
        (["--datasets", "refcoco_unc_train", "--detections", "a.json"], "go together"),
        (["--datasets", "refcoco_unc_train", "--gamma", "nan"], "--gamma is nan, expected -1 to 1"),
        (["--datasets", "refcoco_unc_train", "--min-score", "7"], "--min-score is 7.0, expected 0"),
        (["--datasets", "refcoco_unc_train", "--vocab-min-count", "0"], "expected at least 1"),
        ([], "--datasets"),
    ],
)
def test_wrong_arguments(args, message, capsys):
    with pytest.raises(SystemExit):
        prepare_data.main(args)
    assert message in capsys.readouterr().err


def test_captions_of_coco_mention_its_annotated_objects(prepare):
    train, restval = f"{PREFIX}coco_captions_train", f"{PREFIX}coco_captions_restval"
    out = prepare("--datasets", train, restval)
    images = load_expressions([train, restval], out, required=True)
    assert len(images) == 3
    names = MetadataCatalog.get(train).thing_classes
    assert len(names) == 80
    mentioned = 0
    for image in images:
        classes = {a["id"]: names[a["category_id"]] for a in image["annotations"]}
        english, german = image["expressions"]
        assert english["query"] == "A red cup, left of the dog ." and english["ann_id"] is None
        expected = {i for i, name in classes.items() if name in ("cup", "dog")}
        assert set(english["context_ann_ids"]) == expected and german["context_ann_ids"] == []
        mentioned += len(expected)
    assert mentioned > 2
    assert read(out / train / "statistics.json")["contexts"] == "text similarity"


def test_the_images_that_a_detector_must_not_see_are_written(prepare, capsys):
    name = f"{PREFIX}coco_2014_trainval_without_refer"
    folder = prepare("--datasets", name) / name
    left_out = read(folder / "refer_val_test_images.json")
    assert left_out == sorted(COCO_IDS[2:])  # the splits of the folders
    seen = {image["image_id"] for image in DatasetCatalog.get(name)}
    assert len(seen) == 5 and not seen & set(left_out)
    assert read(folder / "statistics.json") == {"images": 5, "images_of_val_and_test": 3}
    assert str(folder) in capsys.readouterr().out


def test_every_word_unknown_and_nothing_similar(prepare):
    """A vocabulary of nothing and a gamma that nothing reaches still give a whole result."""
    out = prepare("--datasets", TRAIN, "--vocab-min-count", "99", "--gamma", "1")
    statistics = read(out / TRAIN / "statistics.json")
    assert statistics["unknown_words"] == 1 and statistics["referent_misses"] == 1
    assert statistics["contexts_per_expression"] == 0
    contexts = [
        e["context_ann_ids"] for i in load_expressions([TRAIN], out) for e in i["expressions"]
    ]
    assert contexts == [[]] * 4


def test_the_help_shows_the_defaults_of_the_preparation():
    text = prepare_data.make_parser().format_help()
    assert f"{GAMMA_MINILM} for MiniLM, {GAMMA_GLOVE} for a file" in " ".join(text.split())
    assert f"for WSPG; default: {Settings.min_score}" in " ".join(text.split())
