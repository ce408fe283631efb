"""No tool replaces what tools did not write, wherever its options or its work put output."""

import json

import exported
import pytest
from bad_input import run_tool, state_of
from conftest import REPO
from detectron2.data import DatasetCatalog
from test_bad_input import CAPTIONS, DETECTIONS, INSTANCES

from benchmarks import BENCHMARKS
from portable_study import measure
from refshapes.painter import make_scene
from refshapes.writer import coco_dict
from vlnms_d2.file_io import claim, refuse_foreign, write_json

CONFIG = REPO / "configs" / "refshapes" / "vlnms_fc_trained.yaml"
WITHOUT_OUTPUT = {"calibrate_words", "install_detectron2", "recall_table", "web_demo"}
# Inputs that do not exist: outputs are looked at first.
FOLDS = "--detections none --annotations none --captions none --mentions none"
REGIONS = f"--datasets s --proposals a={CONFIG}"

# Tool, its command line, and what it would write; {} is the folder of the test.
CASES = [
    ("benchmark", "nms --json {}/a.json", "a.json"),
    ("benchmark", "overhead --plot {}/a.png", "a.png"),
    ("cross_validate_category", f"{FOLDS} --json {{}}/a.json", "a.json"),
    ("demo", "--input {}/dog.png --query cat --output {}", "dog_01_cat.png"),
    ("demo", "--input {}/dog.png --query cat --output {}", "proposals.json"),
    ("export_pairs", "--config-file {model} --dataset {set} --out {}/out", "out/index.npy"),
    ("export_pairs", "--config-file {model} --dataset {set} --out {}/out", "out/manifest.json"),
    (
        "export_pairs",
        "--config-file {model} --dataset {set} --out {}/out --scan none --scan-out {}/s",
        "s/train_caps.txt",
    ),
    ("export_proposals", "--config-file {model} --dataset {set} --out {}", "proposals.jsonl"),
    ("export_weights", "{}/dog.png {}/b.pth", "b.pth"),
    ("extract_second_stage", f"{REGIONS} --what gt --out {{}} --overwrite", "s/gt.pt"),
    *(
        ("make_refshapes", "--out {} --train 1 --overwrite", name)
        for name in ("instances.json", "contexts.json", "refs(refcoco+).p", "refshapes.json")
    ),
    ("make_refshapes", "--out {} --train 1 --overwrite", "images/refshapes_000001.jpg"),
    ("make_refshapes", "--out {} --train 1 --overwrite", "annotations/instances_train.json"),
    *(
        ("make_refshapes_captions", "--refshapes {shapes} --out {}", name)
        for name in ("train.txt", "Annotations/1.xml", "Sentences/1.txt", "images/1.jpg")
    ),
    ("make_synonyms", "--wordnet none --out {}/a.json", "a.json"),
    *(
        ("prepare_data", "--datasets {set} --out {}", f"exported_val/{name}")
        for name in ("vocab.json", "statistics.json", "pseudo_gt.json", "word_vectors.txt")
    ),
    ("rerank", "{rerank} --out {}", "proposals.jsonl"),
    ("run_ablations", f"--out {{}} --configs {CONFIG} --table {{}}/t", "t.md"),
    ("run_ablations", f"--out {{}} --configs {CONFIG} --table {{}}/t", "t.json"),
    ("run_ablations", f"--out {{}} --configs {CONFIG}", "vlnms_fc_trained/seed0/done.json"),
    ("second_stage_masks", f"--config-file {CONFIG} --datasets s --runs {{}}", "res_s.json"),
    ("second_stage_table", "--runs none --out {}/t", "t.md"),
    ("second_stage_table", "--runs none --out {}/t", "t.json"),
    *(
        ("train_net", "--config-file {model} OUTPUT_DIR {}/out", f"out/{name}")
        for name in ("config.yaml", "last_checkpoint", "model_final.pth", "model_0000099.pth")
    ),
    *(
        ("train_second_stage", "rec --cache none --train s --test t --sources gt --out {}", name)
        for name in ("rec.pth", "gt/rec_t.json", "gt/choices_t.json", "gt/proposals_t.json")
    ),
    *(
        ("train_second_stage", f"retrieval {boxes} --train s --test t --sources gt --out {{}}", n)
        for boxes, n in (
            ("--cache none", "retrieval.pth"),
            ("--cache none --train-boxes own", "gt/retrieval.pth"),
            ("--cache none", "gt/retrieval_t.json"),
        )
    ),
    *(
        ("train_tagger", "--treebank none --out {}", n)
        for n in ("meta.json", "morphologizer/model")
    ),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A small model, data sets, and inputs of the tools."""
    folder = tmp_path_factory.mktemp("inputs")
    exported.make_dataset(folder)
    exported.register(folder)
    contents = {"detections": DETECTIONS, "annotations": INSTANCES, "queries": CAPTIONS}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    write_json(folder / "instances.json", coco_dict([make_scene(0, "train", 0, 1, 384, 288)[1]]))
    (folder / "model").mkdir()
    yield folder
    DatasetCatalog.remove(exported.DATASET)


@pytest.mark.parametrize(("tool", "line", "name"), CASES)
def test_a_file_that_no_tool_wrote_stays(tool, line, name, tmp_path, places, config):
    model = places / "model" / "config.yaml"
    if "{model}" in line and not model.exists():
        exported.save_model(config(), model.parent)
    rerank = " ".join(f"--{n} {places / n}.json" for n in ("detections", "annotations", "queries"))
    words = line.replace("{}", str(tmp_path)).format(
        model=model, set=exported.DATASET, shapes=places, rerank=rerank
    )
    (tmp_path / "dog.png").write_bytes(b"")
    foreign = tmp_path / name
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_text('{"version": 1}')
    before = state_of(tmp_path)
    status, error = run_tool(tool, words.split())
    assert status != 0 and "Traceback" not in error
    named = [foreign] if foreign.parent == tmp_path else [foreign, foreign.parent]
    assert any(f"{path}" in error for path in named), error
    assert state_of(tmp_path) == before


def test_no_tool_is_left_out():
    tools = {path.stem for path in (REPO / "tools").glob("*.py")}
    tools = {name for name in tools if "exit_with" in (REPO / f"tools/{name}.py").read_text()}
    covered = {tool for tool, *_ in CASES} | WITHOUT_OUTPUT | {"interrupts"}
    # Their outputs are those of `OutputFolder`, and need inputs that take long to make.
    others = {"portable_table", "score_pairs"}
    assert tools <= covered | others


def test_pictures_of_portable(tmp_path):
    (tmp_path / "failure_01.jpg").write_text("mine")
    with pytest.raises(ValueError, match=r"failure_01\.jpg: this tool did not write it"):
        measure.draw({}, [], tmp_path, 2)


def test_own_output_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(type(BENCHMARKS["nms"]), "load", lambda _: Measured)
    words = ["nms", "--json", tmp_path / "new" / "a.json"]
    assert run_tool("benchmark", words)[0] == run_tool("benchmark", words)[0] == 0
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"nms": 1}


class Measured:
    measure = staticmethod(lambda _: 1)
    show = staticmethod(str)


def test_links_and_inputs_are_no_output(tmp_path):
    ours = tmp_path / "a.json"
    claim(ours, tmp_path / "b.json")
    write_json(ours, 1)
    write_json(ours, 2)
    refuse_foreign(ours, tmp_path / "b.json", tmp_path / "c.json")
    with pytest.raises(ValueError, match="is an input"):
        refuse_foreign(ours, inputs=[tmp_path / ".." / tmp_path.name / "a.json"])
    ours.write_text("changed by the user")
    with pytest.raises(ValueError, match=r"a\.json: this tool did not write it"):
        refuse_foreign(ours)
    (tmp_path / "b.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"b\.json: this tool did not write it"):
        refuse_foreign(tmp_path / "b.json")
