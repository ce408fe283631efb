"""Data sets with the pseudo ground truth that was made for them."""

import pytest
from detectron2.data import DatasetCatalog

from vlnms_d2.data.pseudo_gt import (
    load_expressions,
    prepared_folder,
    pseudo_gt_file,
    save_pseudo_gt,
)

ANNOTATIONS = [
    {"id": i, "bbox": [10 * i, 0, 5, 5], "bbox_mode": 1, "category_id": 0} for i in (1, 2)
]


def images(context, image_id: int = 1) -> list[dict]:
    expression = {"sent_id": image_id, "query": "cat", "ann_id": 1, "context_ann_ids": context}
    return [
        {
            "image_id": image_id,
            "file_name": f"{image_id}.jpg",
            "annotations": ANNOTATIONS,
            "expressions": [expression],
        }
    ]


@pytest.fixture
def register():
    """Registers a data set of one image for the time of the test."""
    names = []

    def add(name: str, *args) -> str:
        DatasetCatalog.register(name, lambda: images(*args))
        names.append(name)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)


def contexts(loaded: list[dict]) -> list:
    return [e["context_ann_ids"] for image in loaded for e in image["expressions"]]


def test_contexts_come_from_the_file_of_the_data_set(register, tmp_path):
    first, second = register("without_context", None), register("annotated", [2], 7)
    assert contexts(load_expressions([first, second], tmp_path)) == [None, [2]]
    path = pseudo_gt_file(tmp_path, first)
    path.parent.mkdir()
    save_pseudo_gt(path, first, {}, contexts={1: [2]})
    assert contexts(load_expressions([first, second], tmp_path, required=True)) == [[2], [2]]


def test_training_asks_for_what_is_missing(register, tmp_path):
    name = register("without_context", None)
    with pytest.raises(
        FileNotFoundError,
        match=r"without_context/pseudo_gt.json.*prepare_data.py --datasets without_context --out",
    ):
        load_expressions([name], tmp_path, required=True)
    assert contexts(load_expressions([register("annotated", [])], tmp_path, required=True)) == [[]]


def test_the_folder_is_that_of_the_data_sets(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert prepared_folder() == tmp_path / "vlnms_d2"
    assert prepared_folder("elsewhere").name == "elsewhere"
