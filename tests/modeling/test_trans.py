"""The Trans module equals plain loops, one query at a time, whatever it is padded with."""

import pytest
import torch
from closeness import assert_rounds_alike
from detectron2.config import get_cfg
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_attention import plain_trans
from tiny_relatedness import (
    TEXT,
    VISUAL,
    make_locations,
    make_text,
    make_trans,
    make_visual,
    with_noisy_padding,
)
from torch.testing import assert_close

from vlnms_d2 import add_vlnms_config
from vlnms_d2.modeling.relatedness import RelatednessOutput, Trans
from vlnms_d2.modeling.relatedness.trans_layers import (
    CoAttentionLayer,
    JointLayer,
)
from vlnms_d2.modeling.text import TextFeatures

FUSIONS = ["joint", "co_attention", "cross_attention"]
LAYERS = [JointLayer, CoAttentionLayer, JointLayer]
each_fusion = pytest.mark.parametrize("fusion", FUSIONS)


def run(trans: Trans, num_boxes: int, text: TextFeatures) -> RelatednessOutput:
    boxes = make_visual(num_boxes), make_locations(num_boxes)
    return trans(*boxes, text, with_attention=True)


def fields(output: RelatednessOutput) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(output).items() if value is not None}


def is_finite(output: RelatednessOutput) -> bool:
    return all(torch.isfinite(value).all() for value in fields(output).values())


def weighted_sum(output: RelatednessOutput) -> torch.Tensor:
    """Something to differentiate that depends on every logit and refinement."""
    torch.manual_seed(3)
    outputs = [x for x in (output.logits, output.deltas) if x is not None]
    return sum((x * torch.rand_like(x)).sum() for x in outputs)


# --- numbers -----------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    num_boxes=st.integers(0, 6),
    lengths=st.lists(st.integers(0, 5), max_size=4),
    fusion=st.sampled_from(FUSIONS),
    refine=st.booleans(),
    num_heads=st.sampled_from([1, 2, 4]),
    num_layers=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@torch.no_grad()
def test_trans_equals_loops_over_queries_tokens_and_heads(
    num_boxes, lengths, fusion, refine, num_heads, num_layers, seed
):
    trans = make_trans(fusion=fusion, refine=refine, num_heads=num_heads, num_layers=num_layers)
    trans.double()
    visual, where = make_visual(num_boxes, seed).double(), make_locations(num_boxes, seed).double()
    text = make_text(*lengths, seed=seed)
    text.words = text.words.double()
    output = trans(visual, where, text, with_attention=True)
    shape = (len(lengths), num_boxes)
    assert output.logits.shape == shape
    assert output.attention.shape == (*shape, max(lengths, default=0))
    assert output.deltas.shape == (*shape, 4) if refine else output.deltas is None
    assert is_finite(output)
    for i, length in enumerate(lengths if num_boxes else []):
        assert (output.attention[i, :, length:] == 0).all()
        if length == 0 and fusion == "co_attention":
            continue  # What boxes see of no words is open.
        logits, attention, deltas = plain_trans(trans, visual, where, text.words[i, :length])
        # The bias is made in float32.
        assert_rounds_alike(output.logits[i], logits)
        assert_rounds_alike(output.attention[i, :, :length], attention.view(num_boxes, length))
        if refine:
            assert_rounds_alike(output.deltas[i], deltas)


@each_fusion
@pytest.mark.parametrize("lengths", [(2, 5, 0, 1), (0, 3), (0, 0)])
@torch.no_grad()
def test_a_query_scores_the_same_alone_and_beside_longer_ones(fusion, lengths):
    trans, text = make_trans(fusion=fusion), make_text(*lengths)
    together = run(trans, 4, text)
    for i, length in enumerate(lengths):
        alone = run(trans, 4, text[[i]])
        assert alone.attention.shape == (1, 4, length)
        assert_rounds_alike(alone.logits[0], together.logits[i])
        assert_rounds_alike(alone.deltas[0], together.deltas[i])
        assert_rounds_alike(alone.attention[0], together.attention[i][:, :length])


@each_fusion
@torch.no_grad()
def test_padding_never_matters(fusion):
    trans, text = make_trans(fusion=fusion), make_text(4, 2, 3)
    output, longer = run(trans, 3, text), run(trans, 3, with_noisy_padding(text))
    assert_rounds_alike(longer.logits, output.logits)
    assert_rounds_alike(longer.deltas, output.deltas)
    assert (longer.attention[..., 4:] == 0).all()
    assert_rounds_alike(longer.attention[..., :4], output.attention)


@each_fusion
@torch.no_grad()
def test_attention_is_shared_out_among_the_words(fusion):
    lengths = torch.tensor([5, 1, 0, 3])
    attention = run(make_trans(fusion=fusion), 6, make_text(*lengths.tolist())).attention
    assert (attention >= 0).all()
    assert_rounds_alike(attention.sum(dim=2), (lengths > 0).float()[:, None].expand(4, 6))
    padding = torch.arange(5) >= lengths[:, None]
    assert (attention.transpose(1, 2)[padding] == 0).all()
    # It differs from box to box, and is not even.
    assert attention[0].std(dim=0).max() > 1e-5
    assert attention[0].mean(dim=0).std() > 1e-3


@each_fusion
@torch.no_grad()
def test_attention_is_given_where_asked_for_and_changes_nothing_else(fusion):
    trans, text = make_trans(fusion=fusion), make_text(3, 1)
    without = trans(make_visual(4), make_locations(4), text)
    asked = run(trans, 4, text)
    assert without.attention is None and asked.attention is not None
    assert torch.equal(without.logits, asked.logits) and torch.equal(without.deltas, asked.deltas)


@each_fusion
@torch.no_grad()
def test_permuted_boxes_give_permuted_outputs(fusion):
    trans, text = make_trans(fusion=fusion), make_text(3, 0, 5)
    visual, locations, order = make_visual(6), make_locations(6), [4, 0, 5, 2, 1, 3]
    output = trans(visual, locations, text, with_attention=True)
    permuted = trans(visual[order], locations[order], text, with_attention=True)
    for name, value in fields(permuted).items():
        assert_rounds_alike(value, getattr(output, name)[:, order])


@each_fusion
@torch.no_grad()
def test_boxes_are_compared_but_their_number_does_not_matter(fusion):
    trans, text = make_trans(fusion=fusion), make_text(3, 5)
    visual, locations = make_visual(4), make_locations(4)
    output = trans(visual, locations, text)
    twice = trans(visual.repeat(2, 1), locations.repeat(2, 1), text)
    assert_rounds_alike(twice.logits, output.logits.repeat(1, 2))
    fewer = trans(visual[:2], locations[:2], text)
    assert trans.compares_boxes
    assert (fewer.logits - output.logits[:, :2]).abs().max() > 1e-3


@each_fusion
@torch.no_grad()
def test_scores_depend_on_the_look_the_place_and_the_words(fusion):
    trans, text = make_trans(fusion=fusion), make_text(3)
    visual, locations = make_visual(3), make_locations(3)
    output = trans(visual, locations, text)
    for other in (
        trans(make_visual(3, seed=9), locations, text),
        trans(visual, make_locations(3, seed=9), text),
        trans(visual, locations, make_text(3, seed=9)),
    ):
        assert (other.logits - output.logits).abs().max() > 0.01
        assert (other.deltas - output.deltas).abs().max() > 0.01


@each_fusion
@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("with_attention", [True, False])
@pytest.mark.parametrize(
    ("num_boxes", "lengths"), [(0, (2, 3)), (3, ()), (0, ()), (3, (0, 0)), (0, (0,))]
)
def test_without_boxes_queries_or_words(num_boxes, lengths, with_attention, refine, fusion):
    trans, text = make_trans(fusion=fusion, refine=refine), make_text(*lengths)
    output = trans(make_visual(num_boxes), make_locations(num_boxes), text, with_attention)
    shape = (len(lengths), num_boxes)
    expected = {"logits": shape}
    if with_attention:
        expected["attention"] = (*shape, max(lengths, default=0))
    if refine:
        expected["deltas"] = (*shape, 4)
    assert {name: tuple(value.shape) for name, value in fields(output).items()} == expected
    assert is_finite(output)


# --- training ----------------------------------------------------------------------------------


@each_fusion
@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_gradients_reach_every_parameter(num_layers, refine, fusion):
    trans = make_trans(fusion=fusion, refine=refine, num_layers=num_layers).train()
    weighted_sum(run(trans, 5, make_text(3, 0, 4))).backward()
    parameters = dict(trans.named_parameters())
    without = {n for n, p in parameters.items() if p.grad is None or not p.grad.any()}
    assert without == set()
    assert all(torch.isfinite(p.grad).all() for p in parameters.values())
    assert any(name.startswith("mlp_t.") for name in parameters) == refine


@each_fusion
def test_gradients_reach_words_boxes_and_places(fusion):
    trans, text = make_trans(fusion=fusion).train(), make_text(3, 0, 1)
    visual, locations = make_visual(4).requires_grad_(), make_locations(4).requires_grad_()
    text.words.requires_grad_()
    weighted_sum(trans(visual, locations, text)).backward()
    for leaf in (visual, locations, text.words):
        assert torch.isfinite(leaf.grad).all()
    assert visual.grad.any(dim=1).all() and locations.grad.any(dim=1).all()
    assert text.words.grad[text.mask].any(dim=1).all()
    # Padding beside words is masked.
    assert not text.words.grad[2, 1:].any()


@each_fusion
def test_training_and_inference_give_the_same_numbers_without_dropout(fusion):
    trans, text = make_trans(fusion=fusion, dropout=0.0), make_text(3, 0, 5)
    training = run(trans.train(), 6, text)
    with torch.no_grad():
        inference = run(trans.eval(), 6, text)
    for name, value in fields(training).items():
        assert_rounds_alike(value.detach(), getattr(inference, name))


@each_fusion
def test_dropout_acts_in_training_only(fusion):
    plain, dropping = (make_trans(fusion=fusion, dropout=p) for p in (0.0, 0.5))
    text = make_text(3, 2)
    assert torch.equal(run(dropping, 3, text).logits, run(plain, 3, text).logits)
    dropping.train()
    assert not torch.equal(run(dropping, 3, text).logits, run(dropping, 3, text).logits)


@each_fusion
@torch.no_grad()
def test_a_new_module_refines_next_to_nothing(fusion):
    torch.manual_seed(0)
    trans = Trans(visual_dim=VISUAL, text_dim=TEXT, hidden_dim=24, ffn_dim=48, fusion=fusion)
    output = run(trans.eval(), 5, make_text(3, 1))
    assert 0 < output.deltas.abs().max() < 0.01 and output.logits.std() > 0.01


# --- precision ---------------------------------------------------------------------------------


@each_fusion
@pytest.mark.parametrize("scale", [1e-12, 1e4])
@pytest.mark.parametrize("training", [True, False])
def test_extreme_features_give_finite_outputs_and_gradients(training, scale, fusion):
    trans, text = make_trans(fusion=fusion).train(training), make_text(3, 0, 5)
    text.words *= scale
    visual = make_visual(5) * scale
    visual[0] = 0
    visual[1] = scale  # no variance to normalise by
    visual.requires_grad_()
    output = trans(visual, make_locations(5), text, with_attention=True)
    assert is_finite(output)
    weighted_sum(output).backward()
    leaves = [visual, *trans.parameters()]
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves if leaf.grad is not None)


@each_fusion
@pytest.mark.parametrize("training", [True, False])
def test_autocast_is_finite_and_near_full_precision(training, fusion):
    torch.manual_seed(0)
    trans = Trans(visual_dim=VISUAL, text_dim=TEXT, hidden_dim=24, ffn_dim=48, fusion=fusion)
    trans.mlp_t.out.weight.data *= 300  # refinements of the size of a trained module's
    trans.eval().requires_grad_(training)
    text = make_text(3, 0, 5)
    exact = run(trans, 6, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(trans, 6, text)
    assert found.logits.dtype == found.deltas.dtype == torch.float32
    for name, value in fields(found).items():
        expected = getattr(exact, name)
        assert torch.isfinite(value).all()
        assert expected.std() > 0.05
        assert_close(value.float(), expected, atol=0.03, rtol=0.03)


# --- options -----------------------------------------------------------------------------------


def test_an_unknown_fusion_is_an_error_that_names_the_key_and_the_choices():
    with pytest.raises(ValueError, match=r"MODEL\.VLNMS\.TRANS\.FUSION is 'cross'") as error:
        make_trans(fusion="cross")
    assert all(repr(fusion) in str(error.value) for fusion in FUSIONS)


def test_heads_that_do_not_divide_the_width_are_an_error_that_names_both_keys():
    with pytest.raises(ValueError, match=r"HIDDEN_DIM is 8.*NUM_HEADS, 3"):
        make_trans(num_heads=3)


def config():
    cfg = get_cfg()
    add_vlnms_config(cfg)
    trans = cfg.MODEL.VLNMS.TRANS
    trans.HIDDEN_DIM, trans.NUM_HEADS, trans.FFN_DIM, trans.NUM_LAYERS = 12, 3, 20, 4
    trans.DROPOUT = 0.25
    return cfg


@pytest.mark.parametrize(("fusion", "layer"), list(zip(FUSIONS, LAYERS, strict=True)))
def test_from_config_reads_the_keys(fusion, layer):
    cfg = config()
    cfg.MODEL.VLNMS.TRANS.FUSION = fusion
    trans = Trans(cfg, visual_dim=3, text_dim=5)
    narrow = fusion == "cross_attention"
    assert [type(each) for each in trans.layers] == [layer] * 4
    assert [type(each) for each in trans.box_layers] == [JointLayer] * 4 * narrow
    assert trans.word_token.out_features == (64 if narrow else 12)
    first = trans.box_layers[0] if narrow else trans.layers[0]
    first = first.boxes if fusion == "co_attention" else first
    attention = first.cross_attention if fusion == "co_attention" else first.attention
    assert attention.num_heads == 3 and attention.query.in_features == 12
    assert first.ffn.out.in_features == 20 and first.dropout.p == 0.25
    assert trans.visual_token[1].in_features == 3 and trans.word_token.in_features == 5


@pytest.mark.parametrize(("weight", "refines"), [(0.0, False), (0.1, True)])
def test_without_weight_on_its_loss_there_is_no_refinement(weight, refines):
    cfg = config()
    cfg.MODEL.VLNMS.REG_WEIGHT = weight
    trans = Trans(cfg, visual_dim=VISUAL, text_dim=TEXT)
    assert (trans.mlp_t is not None) == refines
    assert any("mlp_t" in name for name in trans.state_dict()) == refines
    assert (run(trans, 3, make_text(2)).deltas is not None) == refines
    assert (run(trans, 0, make_text(2)).deltas is not None) == refines
