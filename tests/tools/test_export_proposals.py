"""tools/export_proposals.py: the command line; what it makes is tested with the engine."""

import importlib.util
import json
from pathlib import Path

import exported
import pytest
from conftest import REPO
from detectron2.data import DatasetCatalog

import export_options
from vlnms_d2.export import FEATURE_FORMATS, FORMATS
from vlnms_d2.export.feature_formats import DDPN_NAMES, TSV_COLUMNS
from vlnms_d2.modeling.feature_extraction import LAYERS

_SPEC = importlib.util.spec_from_file_location("export", REPO / "tools" / "export_proposals.py")
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)


def test_the_options_are_those_of_the_package():
    assert tuple(FORMATS) == export_options.FORMATS
    assert tuple(FEATURE_FORMATS) == export_options.FEATURE_FORMATS
    assert export_options.LAYERS == LAYERS
    assert export_options.DDPN_NAMES == DDPN_NAMES
    assert tuple(TSV_COLUMNS) == export_options.TSV_COLUMNS


@pytest.fixture
def words(config, tmp_path):
    """The command line for a small model and data set, without formats."""
    exported.make_dataset(tmp_path / "datasets")
    exported.register(tmp_path / "datasets")
    model = exported.save_model(config(), tmp_path)
    yield ["--config-file", str(model.config_file), "--dataset", exported.DATASET,
           "--num-gpus", "0", "--out", str(tmp_path / "out")]  # fmt: skip
    DatasetCatalog.remove(exported.DATASET)


def test_a_command_line(words, tmp_path, capsys):
    more = ["--format", "coco", "ddpn", "--top-n", "2", "--masks", "--features", "relatedness"]
    opts = ["--opts", "MODEL.VLNMS.MAX_CANDIDATES", "50"]
    assert tool.main([*words, *more, *opts]) == 0
    printed = capsys.readouterr().out
    assert "queries: 10" in printed and "proposals: 20" in printed and "threshold: 0" in printed
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"results.json", "ddpn", "manifest.json"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["identity"]["config"]["MODEL"]["VLNMS"]["MAX_CANDIDATES"] == 50
    assert manifest["identity"]["settings"]["features"] == "relatedness"
    entries = json.loads((out / "results.json").read_text())
    assert len(entries) == 20 and all("segmentation" in entry for entry in entries)
    assert tool.main([*words, "--format", "jsonl", *opts]) == 1
    error = capsys.readouterr().err
    assert "holds a run of other input or settings" in error and error.count("\n") == 1
    assert tool.main([*words, "--format", "jsonl", "--overwrite", *opts]) == 0
    assert {p.name for p in out.iterdir()} == {"proposals.jsonl", "manifest.json"}


def test_bad_images_are_left_out_if_so_told(words, tmp_path, capsys, caplog):
    images = DatasetCatalog.get(exported.DATASET)
    Path(images[1]["file_name"]).write_bytes(b"no image")
    assert tool.main(words) == 1
    assert images[1]["file_name"] in capsys.readouterr().err
    assert tool.main([*words, "--skip-bad-images"]) == 0
    [warning] = [record.getMessage() for record in caplog.records if "left out" in record.message]
    assert images[1]["file_name"] in warning
    lines = (tmp_path / "out" / "proposals.jsonl").read_text().splitlines()
    found = {json.loads(line)["image_id"] for line in lines}
    assert found == {image["image_id"] for image in images} - {images[1]["image_id"]}
    for image in images:
        Path(image["file_name"]).write_bytes(b"")
    assert tool.main([*words, "--skip-bad-images", "--overwrite"]) == 1
    assert f"no image of {exported.DATASET} can be read" in capsys.readouterr().err


def test_several_data_sets_under_the_name_of_the_forks(words, tmp_path):
    [image, *_] = DatasetCatalog.get(exported.DATASET)
    more = image | {"image_id": 7, "expressions": [image["expressions"][0] | {"sent_id": 99}]}
    DatasetCatalog.register("exported_more", lambda: [more])
    try:
        names = ["--dataset", exported.DATASET, "exported_more"]
        name = ["--matt-dets", "att_vanilla", "0", "refcoco", "unc"]
        assert tool.main([*words, *names, "--format", "per-expression", *name]) == 0
    finally:
        DatasetCatalog.remove("exported_more")
    entries = json.loads(
        (tmp_path / "out" / "matt_dets_att_vanilla_0_refcoco_unc_0.json").read_text()
    )
    assert len({entry["sent_id"] for entry in entries}) == 11


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset", "nothing"], "'nothing' is no registered data set"),
        (["--dataset", exported.DATASET, "nothing"], "'nothing' is no registered data set"),
        (["--matt-dets", "m", "0", "refcoco", "unc"], "matt_dets names the file of per-expression"),
        (["--processes", "0"], "processes is 0"),
        (["--format", "scan"], "give top_n"),
        (["--format", "imram", "--top-n", "2"], "has 2 captions, but the reader takes 5"),
        (["--format", "ddpn", "--top-n", "200"], "DDPN has room for 100 boxes"),
        (["--format", "bottom-up", "--tsv-boxes", "9", "8"], "boxes are (9, 8), expected"),
        (["--opts", "MODEL.WEIGHTS", "no.pth"], "no.pth: no such weights file"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(words, tmp_path, capsys, more, message):
    assert tool.main([*words, *more]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
