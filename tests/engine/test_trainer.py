import copy
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import train_loop
from detectron2.utils.env import seed_all_rng
from killing import exit_code, kill_at_move

import train_net
from vlnms_d2 import add_vlnms_config
from vlnms_d2.data import register_refshapes
from vlnms_d2.engine.checkpoint import SafeCheckpointer
from vlnms_d2.engine.trainer import VLNMSTrainer

ITERATIONS = 6
SMALL = {
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 60,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 60,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.VLNMS.FC.HIDDEN_DIM": 32,
    "MODEL.VLNMS.FC.DROPOUT": 0.5,
    "MODEL.VLNMS.BIGRU.HIDDEN_DIM": 8,
    "MODEL.VLNMS.MAX_QUERIES_PER_IMAGE": 5,
    "MODEL.VLNMS.MAX_CANDIDATES": 60,
    "INPUT.MIN_SIZE_TRAIN": (96, 112),
    "INPUT.MIN_SIZE_TEST": 96,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": ITERATIONS,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "SEED": 5,
}


def settings(kind: str, tiny_refshapes: str, output_dir: Path, **more) -> list:
    """KEY VALUE pairs that make configs/refshapes/{kind}.yaml small."""
    train = f"{tiny_refshapes}_instances_train" if kind == "detector" else f"{tiny_refshapes}_train"
    values = {**SMALL, "DATASETS.TRAIN": (train,), "DATASETS.TEST": (), **more}
    return [x for pair in {**values, "OUTPUT_DIR": str(output_dir)}.items() for x in pair]


def make_config(kind: str, tiny_refshapes: str, output_dir: Path, **more) -> CfgNode:
    cfg = get_cfg()
    add_vlnms_config(cfg)
    cfg.merge_from_file(str(REPO / f"configs/refshapes/{kind}.yaml"))
    cfg.merge_from_list(settings(kind, tiny_refshapes, output_dir, **more))
    output_dir.mkdir(parents=True, exist_ok=True)
    train_net.build_vocabulary(cfg)
    return cfg


def trained(cfg: CfgNode, *, resume: bool = False, stop_before: int | None = None) -> VLNMSTrainer:
    """Train; with `stop_before` the process "dies" when it comes to that iteration."""
    seed_all_rng(cfg.SEED)  # as the tool does
    trainer = VLNMSTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    step = trainer.run_step

    def run_step():
        if trainer.iter == stop_before:
            raise KeyboardInterrupt
        step()

    trainer.run_step = run_step
    if stop_before is None:
        trainer.train()
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    return trainer


def assert_same_weights(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize(
    ("kind", "num_workers"), [("vlnms_fc", 0), ("vlnms_fc", 1), ("detector", 1)]
)
def test_a_resumed_run_gives_the_weights_of_an_unbroken_one(
    kind, num_workers, tiny_refshapes, tmp_path
):
    more = {"DATALOADER.NUM_WORKERS": num_workers}
    whole = trained(make_config(kind, tiny_refshapes, tmp_path / "whole", **more))
    cfg = make_config(kind, tiny_refshapes, tmp_path / "broken", **more)
    trained(cfg, stop_before=1)  # before the first checkpoint
    trained(cfg, resume=True, stop_before=3)  # between two
    torch.rand(17)  # whatever else the process drew
    resumed = trained(cfg, resume=True)
    assert resumed.start_iter == 2
    assert_same_weights(resumed.model.state_dict(), whole.model.state_dict())
    first, second = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=False)
        for name in ("whole", "broken")
    )
    assert first["iteration"] == second["iteration"] == ITERATIONS - 1
    assert_same_weights(first["model"], second["model"])


def run_killed(root: str, arguments: list[str], tag: Path) -> None:
    kill_at_move(tag, 3)
    register_refshapes(root, name="tiny")
    train_net.main(arguments)


def test_a_killed_process_resumes_exactly(tiny_refshapes, tmp_path):
    """SIGKILL of the tool between a checkpoint and the file that names the last one."""
    # The tool sets this threshold.
    more = {"SOLVER.CHECKPOINT_PERIOD": 1, "MODEL.VLNMS.FINAL_SCORE_THRESH": 0.0}
    whole = trained(make_config("vlnms_fc", tiny_refshapes, tmp_path / "whole", **more))
    folder = tmp_path / "killed"
    tag = folder / "last_checkpoint"
    config_file = str(REPO / "configs/refshapes/vlnms_fc.yaml")
    opts = map(str, settings("vlnms_fc", tiny_refshapes, folder, **more))
    arguments = ["--config-file", config_file, *opts]
    code = exit_code(run_killed, os.environ["TINY_REFSHAPES"], arguments, tag)
    assert code == -signal.SIGKILL
    assert tag.read_text() == "model_0000001.pth" and tag.with_name("model_0000002.pth").exists()
    resumed = trained(make_config("vlnms_fc", tiny_refshapes, folder, **more), resume=True)
    assert resumed.start_iter == 2
    assert_same_weights(resumed.model.state_dict(), whole.model.state_dict())


def test_a_run_is_resumed_with_its_settings_alone(tiny_refshapes, tmp_path):
    changes = {
        "SEED": 6,
        "SOLVER.BASE_LR": 0.5,
        "SOLVER.VLNMS.OPTIMIZER": "SGD",
        "DATASETS.TRAIN": (f"{tiny_refshapes}_val",),
        "MODEL.VLNMS.RELATEDNESS": "Trans",
        "MODEL.VLNMS.FC.HIDDEN_DIM": 16,
    }
    trained(make_config("vlnms_fc", tiny_refshapes, tmp_path), stop_before=3)
    checkpoint = (tmp_path / "last_checkpoint").read_text()
    for key, value in changes.items():
        cfg = make_config("vlnms_fc", tiny_refshapes, tmp_path, **{key: value})
        message = rf"{tmp_path}: holds a run of other settings \({key} is .* there, .* now\)"
        with pytest.raises(ValueError, match=message):
            VLNMSTrainer(cfg).resume_or_load(resume=True)
        VLNMSTrainer(cfg).resume_or_load(resume=False)
    assert (tmp_path / "last_checkpoint").read_text() == checkpoint
    # The tool refuses it before it writes anything.
    (tmp_path / "config.yaml").write_text("of the run")
    opts = map(str, settings("vlnms_fc", tiny_refshapes, tmp_path, SEED=6))
    config_file = str(REPO / "configs/refshapes/vlnms_fc.yaml")
    args = train_net.parse_args(["--config-file", config_file, "--resume", *opts])
    with pytest.raises(ValueError, match=r"\(SEED is 5 there, 6 now\)"):
        train_net.setup(args)
    assert (tmp_path / "config.yaml").read_text() == "of the run"
    # How long it lasts, and where it is.
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    more = {"SOLVER.MAX_ITER": 8, "SOLVER.CHECKPOINT_PERIOD": 1, "TEST.DETECTIONS_PER_IMAGE": 9}
    cfg = make_config("vlnms_fc", tiny_refshapes, moved, **more)
    trainer = VLNMSTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    # Of an earlier version, which did not write its settings.
    path = trainer.checkpointer.get_checkpoint_file()
    content = torch.load(path, weights_only=True)
    assert content["trainer"].pop("settings")["SEED"] == 5
    torch.save(content, path)
    cfg.SEED = 6
    VLNMSTrainer(cfg).resume_or_load(resume=True)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    checkpointer = SafeCheckpointer(model, str(tmp_path))
    checkpointer.save("model_1", iteration=1)

    def save_half(content, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_half)
    for name in ("model_1", "model_2"):
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save(name, iteration=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_1.pth"]
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_1.pth")
    assert checkpointer.load(checkpointer.get_checkpoint_file())["iteration"] == 1


def test_the_frozen_detector_is_not_trained_and_parts_have_their_rates(tiny_refshapes, tmp_path):
    more = {
        "SOLVER.VLNMS.VISUAL_ENCODER_LR_FACTOR": 0.25,
        "SOLVER.VLNMS.TEXT_ENCODER_LR_FACTOR": 0.5,
        "SOLVER.BASE_LR": 0.4,
    }
    cfg = make_config("vlnms_fc", tiny_refshapes, tmp_path, **more)
    model = VLNMSTrainer.build_model(cfg)
    optimizer = VLNMSTrainer.build_optimizer(cfg, model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    branch = model.roi_heads.vlnms
    assert isinstance(optimizer, torch.optim.Adam)
    assert {rates.pop(id(p)) for p in branch.visual_encoder.parameters()} == {0.1}
    assert {rates.pop(id(p)) for p in branch.text_encoder.parameters()} == {0.2}
    assert {rates.pop(id(p)) for p in branch.relatedness.parameters()} == {0.4}
    assert not rates


def test_a_detector_that_learns_has_its_losses_on_expressions(tiny_refshapes, tmp_path):
    more = {"MODEL.VLNMS.FREEZE_DETECTOR": False, "SOLVER.MAX_ITER": 1}
    trainer = VLNMSTrainer(make_config("vlnms_fc", tiny_refshapes, tmp_path, **more))
    trainer.resume_or_load(resume=False)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    names = set(trainer.storage.histories())
    assert {"loss_relatedness", "loss_rpn_cls", "loss_cls", "loss_box_reg"} <= names
    moved = [k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])]
    for part in ("backbone.", "proposal_generator.", "roi_heads.box_head", "roi_heads.vlnms."):
        assert any(name.startswith(part) for name in moved), part


@pytest.mark.parametrize("kind", ["vlnms_fc", "vlnms_trans_joint"])
def test_mixed_precision_is_detectron2s(kind, tiny_refshapes, tmp_path, monkeypatch):
    """Its `AMPTrainer` asks for CUDA; autocast and scaling of gradients are those of the CPU."""
    more = {"SOLVER.AMP.ENABLED": True, "SOLVER.MAX_ITER": 2}
    trainer = VLNMSTrainer(make_config(kind, tiny_refshapes, tmp_path, **more))
    trainer.resume_or_load(resume=False)
    trainer._trainer.grad_scaler = torch.amp.GradScaler("cpu")
    cuda = SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr(train_loop, "torch", SimpleNamespace(**{**vars(torch), "cuda": cuda}))
    monkeypatch.setattr(
        torch.cuda.amp, "autocast", lambda dtype: torch.autocast("cpu", torch.bfloat16)
    )
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert trainer.storage.latest()["total_loss"][0] > 0
    moved = [k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])]
    for part in ("visual_encoder", "relatedness"):
        assert any(name.startswith(f"roi_heads.vlnms.{part}") for name in moved), part
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert saved["trainer"]["_trainer"]["grad_scaler"]["scale"] > 0


def test_an_unknown_optimizer_is_an_error(tiny_refshapes, tmp_path):
    cfg = make_config("vlnms_fc", tiny_refshapes, tmp_path)
    cfg.SOLVER.VLNMS.OPTIMIZER = "Sphinx"
    with pytest.raises(ValueError, match="'Sphinx', expected 'Adam' or 'SGD'"):
        VLNMSTrainer.build_optimizer(cfg, torch.nn.Linear(1, 1))


def test_word_vectors_initialise_a_fresh_run_only(tiny_refshapes, tmp_path):
    glove = tmp_path / "glove.txt"
    glove.write_text("the " + " ".join(["0.5"] * 300) + "\n")
    more = {"MODEL.VLNMS.WORD_VECTORS": str(glove), "SOLVER.MAX_ITER": 1}
    cfg = make_config("vlnms_fc", tiny_refshapes, tmp_path / "run", **more)
    trainer = VLNMSTrainer(cfg)
    trainer.resume_or_load(resume=False)
    encoder = trainer.model.roi_heads.vlnms.text_encoder
    row = encoder.vocabulary.encode(["the"])[0]
    assert torch.equal(encoder.embedding.weight[row], torch.full((300,), 0.5))
    before = encoder.embedding.weight.detach().clone()
    trainer.train()
    assert torch.equal(encoder.embedding.weight, before)  # frozen, also from weight decay
    glove.unlink()
    cfg.SOLVER.MAX_ITER = 2
    VLNMSTrainer(cfg).resume_or_load(resume=True)


def test_evaluation_chooses_the_operating_point_on_the_first_data_set(tiny_refshapes, tmp_path):
    test_sets = (f"{tiny_refshapes}_val", f"{tiny_refshapes}_testB")
    cfg = make_config("vlnms_fc", tiny_refshapes, tmp_path, **{"DATASETS.TEST": test_sets})
    model = VLNMSTrainer.build_model(cfg)
    results = VLNMSTrainer.test(cfg, model)
    assert list(results) == list(test_sets)
    written = [tmp_path / "inference" / f"recall_{name}.json" for name in test_sets]
    val, test_b = (json.loads(path.read_text()) for path in written)
    assert val["thresholds"] == test_b["thresholds"]


def test_data_sets_with_and_without_expressions_do_not_mix(tiny_refshapes, tmp_path):
    names = (f"{tiny_refshapes}_train", f"{tiny_refshapes}_instances_train")
    with pytest.raises(ValueError, match="mixes data sets with and without expressions"):
        make_config("vlnms_fc", tiny_refshapes, tmp_path, **{"DATASETS.TRAIN": names})
