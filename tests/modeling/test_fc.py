"""FC relatedness equals Eq. 1 and 2 of the paper, here written out pair by pair in float64."""

import pytest
import torch
from detectron2.config import get_cfg
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_relatedness import TEXT, VISUAL, make_fc, make_text, make_visual, with_noisy_padding

from vlnms_d2 import add_vlnms_config
from vlnms_d2.modeling.relatedness import FC, RelatednessOutput
from vlnms_d2.modeling.relatedness.fc import masked_softmax, score_pairs
from vlnms_d2.modeling.text import TextFeatures


def run(fc: FC, visual: torch.Tensor, text: TextFeatures) -> RelatednessOutput:
    """Without locations: FC does not look at them, and would give NaN if it did."""
    return fc(visual, torch.full((len(visual), 5), torch.nan), text)


def l2_norm(m: torch.Tensor) -> torch.Tensor:
    return m / m.norm().clamp(min=1e-12)


def eq2(box, query, weight, bias):
    """Logits [Q, N] of Eq. 2, query [Q, D] or, one per box, [Q, N, D]."""
    rows = []
    for one_query in query:
        per_box = one_query if one_query.dim() == 2 else [one_query] * len(box)
        rows += [
            (weight * l2_norm(v * q)).sum() + bias[0] for v, q in zip(box, per_box, strict=True)
        ]
    return torch.stack(rows).view(len(query), len(box))


def softmax(scores: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(scores).softmax(dim=0)


def random_form(num_boxes, num_queries, dim, seed, box_scale=1.0, query_scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    box = torch.randn(num_boxes, dim, generator=generator) * box_scale
    query = torch.randn(num_queries, dim, generator=generator) * query_scale
    weight, bias = torch.randn(dim, generator=generator), torch.randn(1, generator=generator)
    return box, query, weight, bias


@settings(max_examples=60, deadline=None)
@given(
    num_boxes=st.integers(1, 5),
    num_queries=st.integers(1, 4),
    dim=st.integers(1, 12),
    seed=st.integers(0, 1000),
    box_exponent=st.integers(-8, 8),
    query_exponent=st.integers(-8, 8),
    zero=st.sampled_from(["nothing", "box", "query", "column", "complementary"]),
)
def test_closed_form_is_eq_2(num_boxes, num_queries, dim, seed, box_exponent, query_exponent, zero):
    box, query, weight, bias = random_form(
        num_boxes, num_queries, dim, seed, 10.0**box_exponent, 10.0**query_exponent
    )
    if zero == "box":
        box[0] = 0
    elif zero == "query":
        query[-1] = 0
    elif zero == "column":
        box[:, 0] = 0
    elif zero == "complementary":
        box[0, : dim // 2], query[0, dim // 2 :] = 0, 0
    found = score_pairs(box, query, weight, bias)
    expected = eq2(*(t.double() for t in (box, query, weight, bias)))
    assert found.shape == (num_queries, num_boxes) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.sigmoid().double(), expected.sigmoid(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_boxes", [0, 3])
@pytest.mark.parametrize("num_queries", [0, 2])
def test_closed_form_without_boxes_or_queries(num_boxes, num_queries):
    found = score_pairs(*random_form(num_boxes, num_queries, 4, seed=0))
    assert found.shape == (num_queries, num_boxes)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_gradients_of_the_closed_form_are_those_of_eq_2(scale):
    inputs = [t.double() for t in random_form(4, 3, 5, seed=2, box_scale=scale)]
    inputs[0][1] = 0
    inputs[1][2] = 0
    upstream = torch.randn(3, 4, dtype=torch.float64)
    gradients = []
    for form in (score_pairs, eq2):
        leaves = [t.clone().requires_grad_() for t in inputs]
        (form(*leaves) * upstream).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for closed, direct in zip(*gradients, strict=True):
        assert torch.isfinite(closed).all() and closed.abs().sum() > 0
        torch.testing.assert_close(closed, direct, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_square_in_half_precision(dtype):
    """Squares of features above 256 overflow in float16, and those below 2e-4 vanish."""
    box, query, weight, bias = random_form(5, 3, 8, seed=0, box_scale=3000.0)
    box[0], query[0] = 0, 0
    box[1] *= 1e-8
    exact = score_pairs(box, query, weight, bias)
    with torch.autocast("cpu", dtype=dtype):
        found = score_pairs(box, query, weight, bias)
        rounded = score_pairs(box.to(dtype), query.to(dtype), weight, bias)
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(rounded[1:, 2:].float(), exact[1:, 2:], atol=0.05, rtol=0.05)
    assert torch.isfinite(rounded).all()


@pytest.mark.parametrize("options", [{}, {"attention": "additive"}, {"relu": True}])
def test_autocast_gives_finite_logits_close_to_full_precision(options):
    fc, visual, text = make_fc(**options), make_visual(4) * 300, make_text(3, 0, 1)
    exact = run(fc, visual, text).logits
    with torch.autocast("cpu", dtype=torch.float16):
        found = run(fc, visual, text).logits
    torch.testing.assert_close(found.float(), exact, atol=0.02, rtol=0.02)


def test_linear_attention_is_eq_1_whatever_mlp_a_says_of_a_box():
    fc, visual, text = make_fc(), make_visual(5).double(), make_text(4, 2, 1)
    fc.double()
    text.words = text.words.double()
    mlp_a = torch.nn.Sequential(
        torch.nn.Linear(VISUAL, 9), torch.nn.ReLU(), torch.nn.Linear(9, TEXT)
    ).double()
    fc_s_of_box = torch.randn(TEXT, dtype=torch.float64)

    alphas, queries = [], []
    for words, mask in zip(text.words, text.mask, strict=True):
        per_box = []
        for v in visual:
            box_term = (fc_s_of_box * mlp_a(v)).sum()
            # FC_s([MLP_a(v_i); w_j])
            per_box.append(softmax([box_term + fc.fc_s(w)[0] for w in words[mask]]))
        alphas.append(torch.stack(per_box))
        queries.append(torch.stack([alpha @ words[mask] for alpha in per_box]))

    output = run(fc, visual, text)
    assert output.attention.shape == (3, 4)
    for alpha, found, mask in zip(alphas, output.attention, text.mask, strict=True):
        # The box's term cancels in every row: all boxes have the weights of the closed form.
        torch.testing.assert_close(alpha, found[mask].expand_as(alpha))
    expected = eq2(fc.mlp_b(visual), torch.stack(queries), fc.fc_r.weight[0], fc.fc_r.bias)
    torch.testing.assert_close(output.logits, expected)


def additive_reference(fc: FC, visual, text):
    """Attention per query [N, L of the query] and logits [Q, N], pair by pair."""
    alphas, queries = [], []
    for words, mask in zip(text.words, text.mask, strict=True):
        per_box = []
        for v in visual:
            box = fc.attend_box.weight @ fc.mlp_a(v)
            scores = []
            for w in words[mask]:
                word = fc.attend_word.weight @ w + fc.attend_word.bias
                hidden = torch.tanh(box + word)
                scores.append((fc.fc_s.weight[0] * hidden).sum() + fc.fc_s.bias[0])
            per_box.append(softmax(scores))
        alphas.append(torch.stack(per_box))
        queries.append(torch.stack([alpha @ words[mask] for alpha in per_box]))
    logits = eq2(fc.mlp_b(visual), torch.stack(queries), fc.fc_r.weight[0], fc.fc_r.bias)
    return alphas, logits


def test_additive_attention_equals_a_loop_over_pairs():
    fc, visual, text = make_fc(attention="additive"), make_visual(4), make_text(3, 1, 5)
    output = run(fc, visual, text)
    alphas, logits = additive_reference(fc, visual, text)
    assert output.attention.shape == (3, 4, 5)
    for alpha, found, mask in zip(alphas, output.attention, text.mask, strict=True):
        torch.testing.assert_close(found[:, mask], alpha)
    torch.testing.assert_close(output.logits, logits)


def test_additive_attention_looks_at_the_box_and_linear_does_not():
    visual, text = make_visual(2) * 3, make_text(4)
    additive = run(make_fc(attention="additive"), visual, text).attention[0]
    assert (additive[0] - additive[1]).abs().max() > 0.01
    linear = make_fc()
    assert torch.equal(
        run(linear, visual, text).attention, run(linear, make_visual(6, seed=9), text).attention
    )


OPTIONS = [
    {},
    {"relu": True},
    {"dropout": 0.5},
    {"attention": "additive"},
    {"attention": "additive", "relu": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_padding_never_matters(options):
    fc, visual, text = make_fc(**options), make_visual(3), make_text(4, 2, 3)
    output, longer = run(fc, visual, text), run(fc, visual, with_noisy_padding(text))
    torch.testing.assert_close(longer.logits, output.logits)
    assert (longer.attention[..., 4:] == 0).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_a_query_scores_the_same_alone_and_beside_longer_ones(options):
    fc, visual, text = make_fc(**options), make_visual(3), make_text(2, 7, 1)
    together = run(fc, visual, text)
    for i in range(3):
        alone = run(fc, visual, text[[i]])
        length = int(text.mask[i].sum())
        assert alone.attention.shape[-1] == length
        torch.testing.assert_close(alone.logits[0], together.logits[i])
        torch.testing.assert_close(alone.attention[0], together.attention[i][..., :length])


@pytest.mark.parametrize("options", OPTIONS)
def test_a_box_scores_the_same_alone_and_beside_others(options):
    fc, visual, text = make_fc(**options), make_visual(4), make_text(2, 3)
    together = run(fc, visual, text).logits
    alone = torch.cat([run(fc, v[None], text).logits for v in visual], dim=1)
    torch.testing.assert_close(alone, together)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("num_boxes", "lengths"), [(0, (2, 3)), (3, ()), (0, ()), (3, (0, 0)), (0, (0,))]
)
def test_without_boxes_queries_or_words(options, num_boxes, lengths):
    output = run(make_fc(**options), make_visual(num_boxes), make_text(*lengths))
    assert output.logits.shape == (len(lengths), num_boxes)
    assert torch.isfinite(output.logits).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_query_without_words_gives_the_bias_and_finite_gradients(options, training):
    fc, visual, text = make_fc(**options).train(training), make_visual(3), make_text(0, 2)
    visual.requires_grad_()
    text.words.requires_grad_()
    output = run(fc, visual, text)
    assert (output.attention[0] == 0).all()
    torch.testing.assert_close(output.logits[0], fc.fc_r.bias.expand(3))
    output.logits.sum().backward()
    leaves = [visual, text.words, *fc.parameters()]
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_relu_comes_before_the_l2_norm():
    fc, visual, text = make_fc(relu=True), make_visual(3), make_text(2, 3)
    output = run(fc, visual, text)
    box = fc.mlp_b(visual)
    for i in range(2):
        query = output.attention[i] @ text.words[i]
        for j in range(3):
            m = l2_norm((box[j] * query).relu())
            expected = (fc.fc_r.weight[0] * m).sum() + fc.fc_r.bias[0]
            torch.testing.assert_close(output.logits[i, j], expected)
    assert not torch.allclose(output.logits, run(make_fc(), visual, text).logits)


@pytest.mark.parametrize("attention", ["linear", "additive"])
def test_dropout_acts_in_training_only(attention):
    visual, text = make_visual(3), make_text(2, 3)
    plain, dropping = make_fc(attention=attention), make_fc(attention=attention, dropout=0.5)
    torch.testing.assert_close(run(dropping, visual, text).logits, run(plain, visual, text).logits)
    dropping.train()
    assert not torch.equal(run(dropping, visual, text).logits, run(dropping, visual, text).logits)
    torch.testing.assert_close(
        run(plain.train(), visual, text).logits, run(plain, visual, text).logits
    )


def test_dropout_is_on_m_and_on_the_attentions_box_input():
    visual, text = make_visual(3), make_text(2, 3)
    everything = make_fc(attention="additive", dropout=1.0).train()
    output = run(everything, visual, text)
    assert torch.equal(output.logits, everything.fc_r.bias.expand(2, 3))
    assert torch.equal(output.attention[:, 0], output.attention[:, 2])
    with torch.no_grad():
        assert not torch.equal(
            run(everything.eval(), visual, text).attention[:, 0], output.attention[:, 0]
        )


def test_an_unknown_attention_is_an_error_that_names_the_key_and_the_choices():
    with pytest.raises(ValueError, match=r"MODEL\.VLNMS\.ATTENTION is 'dot'") as error:
        make_fc(attention="dot")
    assert "linear" in str(error.value) and "additive" in str(error.value)


def test_from_config_reads_the_keys():
    cfg = get_cfg()
    add_vlnms_config(cfg)
    cfg.MODEL.VLNMS.ATTENTION = "additive"
    cfg.MODEL.VLNMS.FC.HIDDEN_DIM, cfg.MODEL.VLNMS.FC.RELU = 11, True
    cfg.MODEL.VLNMS.FC.DROPOUT = 0.25
    fc = FC(cfg, visual_dim=3, text_dim=4)
    assert fc.attention == "additive" and fc.relu is True and fc.dropout.p == 0.25
    assert [fc.mlp_b[0].in_features, fc.mlp_b[0].out_features, fc.mlp_b[2].out_features] == [
        3,
        11,
        4,
    ]


def test_masked_softmax_keeps_extreme_scores_and_rows_without_words():
    scores = torch.tensor([[1e30, -1e30, 5.0], [-1e30, 3e38, 0.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    expected = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(masked_softmax(scores, mask), expected)
