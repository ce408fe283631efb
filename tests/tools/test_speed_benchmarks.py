"""The benchmarks of speed, on a small detector: what they compare, and what they write."""

import pytest
import torch
from conftest import HEADS
from detectron2.modeling import StandardROIHeads
from small_models import stock_config
from transformers import BertConfig, GroundingDinoConfig, SwinConfig

from benchmarks import BENCHMARKS, Options, base, grounding_dino, overhead
from benchmarks.detector import build_pair, pair_scores
from benchmarks.overhead import plot_time
from vlnms_d2.modeling import VLNMSHead, split_by_query

CPU = torch.device("cpu")


@pytest.fixture(params=["VLNMSHead"])
def options(request, tmp_path) -> Options:
    """Of a detector with few channels; 20 candidates, each side timed once."""
    cfg = stock_config(HEADS[request.param])
    cfg.MODEL.VLNMS.TRANS.HIDDEN_DIM, cfg.MODEL.VLNMS.TRANS.NUM_HEADS = 16, 2
    path = tmp_path / "small.yaml"
    path.write_text(cfg.dump())
    return Options(config_file=path, candidates=20, rounds=1, queries=(1, 3))


# --- both sides --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["VLNMSHead", "VLNMSCascadeHead"], indirect=True)
@torch.no_grad()
def test_both_sides_are_one_detector_with_as_many_candidates_as_asked_for(options):
    pair = build_pair(options.load_config("unused"), options.candidates)
    assert (pair_scores(pair.vlnms, pair.image_input) > pair.score_thresh).sum() == 20
    stock, ours = (model([pair.image_input])[0]["instances"] for model in (pair.stock, pair.vlnms))
    assert len(stock) > 1
    assert torch.equal(stock.pred_boxes.tensor, ours.pred_boxes.tensor)
    assert torch.equal(stock.scores, ours.scores)
    asked = pair.vlnms([pair.image_input | {"query": ["a", "b"]}])[0]["instances"]
    assert all(len(own) > 0 for own in split_by_query(asked, 2))


def test_stock_is_stock(options):
    pair = build_pair(options.load_config("unused"), 20)
    assert type(pair.stock.roi_heads) is StandardROIHeads
    assert type(pair.vlnms.roi_heads) is VLNMSHead


@pytest.mark.parametrize("options", ["VLNMSRes5Head"], indirect=True)
def test_a_detector_without_an_fpn_is_refused(options):
    with pytest.raises(ValueError, match="on an FPN"):
        build_pair(options.load_config("unused"), 20)


def test_too_many_candidates_and_other_heads_are_refused(options):
    cfg = options.load_config("unused")
    with pytest.raises(ValueError, match="expected more than the 500 of --candidates"):
        build_pair(cfg, 500)
    cfg.MODEL.ROI_HEADS.NAME = "PointRendROIHeads"
    with pytest.raises(ValueError, match=r"is PointRendROIHeads and .* expected one of VLNMSHead"):
        build_pair(cfg, 20)


# --- timing ------------------------------------------------------------------------------------


def test_sides_take_turns_and_the_warm_up_does_not_count(monkeypatch):
    clock, calls = [0.0], []

    def side(name, seconds):
        def run():
            calls.append(name)
            clock[0] += seconds.pop(0)

        return run

    monkeypatch.setattr(base.time, "perf_counter", lambda: clock[0])
    sides = {"a": side("a", [100, 1, 5, 2]), "b": side("b", [100, 10, 30, 20])}
    medians = base.time_interleaved(sides, 3, CPU)
    assert calls == ["a", "b"] * 4
    assert medians == {"a": pytest.approx(2), "b": pytest.approx(20)}


def fixed_times(monkeypatch, module, seconds):
    """Let sides run once, and say that they took these times, in their order."""

    def run_once(sides, rounds, device):
        for side in sides.values():
            side()
        return dict(zip(sides, seconds, strict=True))

    monkeypatch.setattr(module, "time_interleaved", run_once)


VARIANTS = {
    "overhead": ["finetune", "shared"],
    "trans": ["joint", "co_attention", "cross_attention"],
}


@pytest.mark.parametrize(("name", "key"), [("overhead", "visual_encoder"), ("trans", "fusion")])
def test_overhead_is_the_ratio_to_the_detector(options, monkeypatch, name, key):
    fixed_times(monkeypatch, overhead, [2.0, 2.5, 3.0])
    built = []

    def build(cfg, num_candidates):
        built.append(cfg.MODEL.VLNMS)
        return build_pair(cfg, num_candidates)

    monkeypatch.setattr(overhead, "build_pair", build)
    results = BENCHMARKS[name].load().measure(options)
    assert results["relatedness"] == {"overhead": "FC", "trans": "Trans"}[name]
    settings = [v.TRANS.FUSION if key == "fusion" else v.VISUAL_ENCODER for v in built]
    assert settings == VARIANTS[name]
    found = [(row[key], row["queries"], row["ratio"]) for row in results["rows"]]
    assert found == [
        (variant, queries, ratio)
        for variant in VARIANTS[name]
        for queries, ratio in ((1, 1.25), (3, 1.5))
    ]
    shown = BENCHMARKS[name].load().show(results)
    assert "1.250" in shown and all(variant in shown for variant in VARIANTS[name])


def test_training_counts_expressions(options, monkeypatch):
    from benchmarks import train

    forwards = []
    step = train._step
    monkeypatch.setattr(train, "_step", lambda *a: forwards.append(len(a[2])) or step(*a))
    fixed_times(monkeypatch, train, [0.5, 2.0])
    [one, three] = BENCHMARKS["train"].load().measure(options)["rows"]
    assert forwards == [1, 1, 1, 3]
    assert (one["ratio"], three["ratio"]) == (4.0, 4.0)
    assert (three["shared_per_second"], three["single_per_second"]) == (6.0, 1.5)


def test_parts_of_a_forward(options):
    results = BENCHMARKS["scoring"].load().measure(options)
    assert list(results["image"])[:2] == ["backbone", "RPN"] and len(results["image"]) == 6
    assert [row["queries"] for row in results["rows"]] == [1, 3]
    assert all(value > 0 for row in results["rows"] for value in row.values())
    assert "fusion and NMS" in BENCHMARKS["scoring"].load().show(results)


def test_masks_in_time_and_memory(options, monkeypatch):
    peaks = [{"queries": 1, "peak_mib": 5.0}, {"queries": 3, "peak_mib": 6.0}]
    monkeypatch.setattr(overhead, "peak_rows", lambda measure, args, counts: peaks)
    results = BENCHMARKS["masks"].load().measure(options)
    assert [(row["queries"], row["peak_mib"]) for row in results["rows"]] == [(1, 5.0), (3, 6.0)]
    assert all(row["ratio"] > 0 for row in results["rows"])
    assert "MODEL.VLNMS.MASKS auto" in BENCHMARKS["masks"].load().show(results)


def test_a_forward_raises_the_peak_of_memory(options):
    text = options.load_config("unused", ["MODEL.MASK_ON", "True"]).dump()
    # In a fresh process: in this one, memory that earlier tests have freed would hide the peak.
    [row] = overhead.peak_rows(overhead._peak_of_forward, (text, 20), [1000])
    assert row["peak_mib"] > 10  # words alone are 20 MiB


# --- Grounding DINO ----------------------------------------------------------------------------


def test_grounding_dino_is_counted_once_a_query(options, monkeypatch):
    monkeypatch.setattr(grounding_dino, "grounding_dino", lambda device: lambda: None)
    fixed_times(monkeypatch, grounding_dino, [6.0, 2.0, 3.0])
    results = BENCHMARKS["grounding_dino"].load().measure(options)
    assert [row["times_faster"] for row in results["rows"]] == [3.0, 6.0]
    assert "6 times faster" in BENCHMARKS["grounding_dino"].load().show(results)


def test_a_small_grounding_dino_runs():
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], out_indices=[2, 3, 4]
        ),
        text_config=BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=10,
    )
    output = grounding_dino.grounding_dino(CPU, config)()
    assert output.pred_boxes.shape == (1, 10, 4) and not output.pred_boxes.requires_grad


# --- picture -----------------------------------------------------------------------------------


def test_the_picture(tmp_path):
    rows = [
        {"visual_encoder": e, "queries": q, "detector_ms": 900.0, "with_queries_ms": 1000.0 + q}
        for e in ("finetune", "shared")
        for q in (1, 100)
    ]
    results = {"overhead": {"rows": rows}}
    plot_time(results, tmp_path / "time.png")
    alone = (tmp_path / "time.png").read_bytes()
    assert alone.startswith(b"\x89PNG")
    trans = {"fusion": "cross_attention", "queries": 1, "with_queries_ms": 2000.0}
    results["trans"] = {"rows": [trans]}
    plot_time(results, tmp_path / "time.png")
    with_trans = (tmp_path / "time.png").read_bytes()
    assert with_trans != alone
    results["grounding_dino"] = {"rows": [{"grounding_dino_s_per_query": 5.0}]}
    plot_time(results, tmp_path / "time.png")
    assert (tmp_path / "time.png").read_bytes() not in (alone, with_trans)
