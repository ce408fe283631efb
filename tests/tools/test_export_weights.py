from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from small_models import build

from export_weights import export


def test_the_exported_weights_load_and_are_small(config, tmp_path):
    model = build(config())
    checkpoint, exported = tmp_path / "model_final.pth", tmp_path / "models" / "small.pth"
    torch.save({"model": model.state_dict(), "optimizer": torch.zeros(10**6)}, checkpoint)
    size = export(checkpoint, exported)
    assert size == exported.stat().st_size < checkpoint.stat().st_size / 2

    other = build(config(), seed=1)
    DetectionCheckpointer(other).load(str(exported))
    loaded, weights = other.state_dict(), model.state_dict()
    for name, value in weights.items():
        torch.testing.assert_close(loaded[name], value, rtol=1e-3, atol=1e-4)
    branch = "roi_heads.vlnms.text_encoder.vocabulary_fingerprint"
    assert loaded[branch].equal(weights[branch])


def test_the_detector_can_be_taken_out(config, tmp_path):
    model = build(config())
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    export(tmp_path / "model_final.pth", tmp_path / "detector.pth", detector_only=True)
    names = torch.load(tmp_path / "detector.pth", weights_only=True)["model"].keys()
    assert names == {name for name in model.state_dict() if ".vlnms." not in name}


def test_no_file_of_others_is_replaced(config, tmp_path):
    checkpoint, link = tmp_path / "a.pth", tmp_path / "link.pth"
    model = build(config()).state_dict()
    torch.save({"model": model, "optimizer": torch.zeros(9)}, checkpoint)
    link.symlink_to(checkpoint)
    (tmp_path / "hard.pth").hardlink_to(checkpoint)
    torch.save({"model": model}, tmp_path / "other.pth")
    (tmp_path / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in before:
        with pytest.raises(ValueError, match=rf"{path.name}: this tool did not write it"):
            export(checkpoint, path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    export(checkpoint, tmp_path / "small.pth")
    export(checkpoint, tmp_path / "small.pth")
    with pytest.raises(ValueError, match="did not write it"):
        export(tmp_path / "small.pth", tmp_path / "small.pth", detector_only=True)


def test_what_cannot_be_exported_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*absent\.pth"):
        export(tmp_path / "absent.pth", tmp_path / "out.pth")
    torch.save({"weights": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match='no entry "model"'):
        export(tmp_path / "other.pth", tmp_path / "out.pth")
    torch.save({"model": {"w": torch.tensor([1e6])}}, tmp_path / "large.pth")
    with pytest.raises(ValueError, match="half precision"):
        export(tmp_path / "large.pth", tmp_path / "out.pth")
    assert not Path(tmp_path / "out.pth").exists()
