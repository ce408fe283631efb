"""The BiGRU text encoder, and the features that it hands on."""

import logging
import pickle

import pytest
import torch
from closeness import assert_rounds_alike
from detectron2.config import get_cfg
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from vlnms_d2 import add_vlnms_config
from vlnms_d2.modeling.text import BiGRU, TextFeatures, Vocabulary, build_text_encoder
from vlnms_d2.modeling.text.build import pad_words

WORDS = ("a", "red", "cup", "left", "man's", "naïve", "собака", "杯")


def make_encoder(max_words: int = 6, words=WORDS, **given) -> BiGRU:
    torch.manual_seed(0)
    given = {"vocabulary": Vocabulary(words), **given}
    return BiGRU(embed_dim=5, hidden_dim=4, max_words=max_words, **given)


@pytest.fixture(scope="module")
def encoder() -> BiGRU:
    return make_encoder()


@torch.no_grad()
def plain_gru(encoder: BiGRU, query: str) -> torch.Tensor:
    """Word features [L, D] of one query, without packing or padding."""
    ids = torch.tensor([encoder.vocabulary.encode(encoder.tokenize(query))])
    return encoder.gru(encoder.embedding(ids))[0][0]


@settings(max_examples=40, deadline=None)
@given(
    queries=st.lists(
        st.lists(st.sampled_from([*WORDS, "zebra"]), max_size=8).map(" ".join), max_size=6
    )
)
@torch.no_grad()
def test_each_query_has_the_features_of_an_unpadded_gru(encoder, queries):
    features = encoder(queries)
    lengths = [len(encoder.tokenize(query)) for query in queries]
    assert len(features) == len(queries)
    assert features.words.shape == (len(queries), max(lengths, default=0), encoder.output_dim)
    assert features.mask.sum(dim=1).tolist() == lengths
    for words, mask, query, length in zip(
        features.words, features.mask, queries, lengths, strict=True
    ):
        assert mask.tolist() == [j < length for j in range(len(mask))]
        assert (words[length:] == 0).all()
        if length:
            assert_rounds_alike(words[:length], plain_gru(encoder, query))


@torch.no_grad()
def test_a_word_feature_sees_both_sides(encoder):
    feature = encoder(["a red cup", "left red cup", "a red left"]).words[:, 1]
    assert (feature[0] - feature[1]).abs().max() > 0.01
    assert (feature[0] - feature[2]).abs().max() > 0.01


@pytest.mark.parametrize("blank", ["", "   ", "\t\n", "?! ..."])
@torch.no_grad()
def test_blank_queries_are_rows_without_words(encoder, blank):
    features = encoder(["red cup", blank])
    assert features.mask.tolist() == [[True, True], [False, False]]
    assert (features.words[1] == 0).all()
    assert_rounds_alike(features.words[0], plain_gru(encoder, "red cup"))
    alone = encoder([blank])
    assert alone.words.shape == (1, 0, encoder.output_dim) and alone.mask.shape == (1, 0)


@torch.no_grad()
def test_long_queries_are_cut_at_max_words():
    encoder = make_encoder(max_words=3)
    assert encoder.tokenize("A red, left cup") == ["a", "red", "left"]
    cut, short = encoder(["a red left cup cup"]), encoder(["a red left"])
    assert torch.equal(cut.words, short.words) and torch.equal(cut.mask, short.mask)


@pytest.mark.parametrize("max_words", [0, -1])
def test_max_words_below_one_is_an_error(max_words):
    with pytest.raises(ValueError, match=rf"MAX_WORDS is {max_words}, expected at least 1"):
        make_encoder(max_words)


@torch.no_grad()
def test_unknown_words_are_all_the_same_word_and_not_a_known_one(encoder):
    features = encoder(["red zebra", "red giraffe", "red cup"]).words
    assert_rounds_alike(features[0], features[1])
    assert (features[0] - features[2]).abs().max() > 0.01


@torch.no_grad()
def test_equal_queries_have_equal_features(encoder):
    features = encoder(["red cup", "a", "red cup", "RED  cup!"]).words
    assert_rounds_alike(features[2], features[0])
    assert_rounds_alike(features[3], features[0])


@pytest.mark.parametrize(
    ("query", "same"),
    [("NAÏVE", "naïve"), ("nai\u0308ve", "naïve"), ("СОБАКА", "собака"), ("杯。", "杯")],
)
@torch.no_grad()
def test_non_ascii_words_are_known_in_every_spelling(encoder, query, same):
    assert encoder.vocabulary.encode(encoder.tokenize(query)) == [WORDS.index(same) + 2]
    assert torch.equal(encoder([query]).words, encoder([same]).words)


@torch.no_grad()
def test_an_empty_vocabulary_still_encodes():
    features = make_encoder(words=())(["red cup"])
    assert features.mask.tolist() == [[True, True]] and features.words.abs().sum() > 0


def test_gradients_reach_the_words_of_the_batch_alone():
    encoder = make_encoder()
    features = encoder(["red cup", "", "red"])
    features.words.square().sum().backward()
    touched = encoder.embedding.weight.grad.abs().sum(dim=1) > 0
    assert touched.nonzero().flatten().tolist() == encoder.vocabulary.encode(["red", "cup"])
    assert all(p.grad.abs().sum() > 0 for p in encoder.gru.parameters())


@torch.no_grad()
def test_a_gru_that_answers_in_half_precision_is_read_too():
    """As cuDNN's does under autocast."""
    encoder = make_encoder()
    full = encoder(["red cup", "", "a"])
    encoder.gru.register_forward_hook(
        lambda gru, inputs, output: (output[0]._replace(data=output[0].data.half()), output[1])
    )
    half = encoder(["red cup", "", "a"])
    assert half.words.dtype == torch.float32
    torch.testing.assert_close(half.words, full.words, atol=1e-3, rtol=0)


def test_word_vectors_fill_the_rows_of_known_words_and_leave_the_others(tmp_path):
    encoder = make_encoder()
    before = encoder.embedding.weight.detach().clone()
    lines = ["cup 1 2 3 4 5", "zebra 9 9 9 9 9", "naïve -1 0.5 0 0 0"]
    (tmp_path / "vectors.txt").write_text("\n".join(lines), encoding="utf-8")
    assert encoder.load_word_vectors(tmp_path / "vectors.txt") == 2
    known = {"cup": [1, 2, 3, 4, 5], "naïve": [-1, 0.5, 0, 0, 0]}
    for i, word in enumerate(encoder.vocabulary.words):
        expected = torch.tensor(known[word], dtype=torch.float32) if word in known else before[i]
        assert torch.equal(encoder.embedding.weight[i], expected), word
    assert encoder.embedding.weight.requires_grad


def test_frozen_word_vectors_stay_and_words_without_one_are_zero(tmp_path):
    encoder = make_encoder(freeze_embedding=True)
    (tmp_path / "vectors.txt").write_text("cup 1 2 3 4 5\n")
    assert encoder.load_word_vectors(tmp_path / "vectors.txt") == 1
    expected = torch.zeros_like(encoder.embedding.weight)
    expected[encoder.vocabulary.encode(["cup"])] = torch.tensor([1.0, 2, 3, 4, 5])
    encoder(["red cup", "a"]).words.sum().backward()
    assert encoder.embedding.weight.grad is None and encoder.gru.weight_ih_l0.grad.any()
    assert torch.equal(encoder.embedding.weight, expected)


def test_words_between_spaces_are_the_tokens_of_refer():
    sentences = ["a man , in black", "the t-shirt he ' s in , black"] * 2
    vocabulary = Vocabulary.build(sentences, 2, "spaces")
    encoder = make_encoder(vocabulary=vocabulary, split="spaces", max_words=5)
    tokens = ["the", "t-shirt", "he", "'", "s"]
    assert encoder.tokenize(sentences[1]) == tokens
    assert encoder.tokenize("The t-shirt, he's IN") == ["the", "t", "shirt", "he's", "in"]
    assert encoder.tokenize("<pad> man ?! , zebra-man") == ["man", ",", "zebra", "man"]
    assert encoder(["a man , in black", "?"]).mask.sum(dim=1).tolist() == [5, 0]
    assert "," not in Vocabulary.build(sentences)
    with pytest.raises(ValueError, match=r"BIGRU\.SPLIT is 'tokens', expected words or spaces"):
        make_encoder(split="tokens")
    with pytest.raises(ValueError, match=r"BIGRU\.SPLIT is 'tokens', expected words or spaces"):
        Vocabulary.build(sentences, 2, "tokens")
    again = pickle.loads(pickle.dumps(encoder))
    assert again.tokenize(sentences[1]) == tokens


@pytest.mark.parametrize(
    ("vectors", "frozen", "trained"), [("", True, True), ("x", True, False), ("x", False, True)]
)
def test_embeddings_are_frozen_if_word_vectors_initialise_them(vectors, frozen, trained):
    cfg = config(WORD_VECTORS=vectors)
    cfg.MODEL.VLNMS.BIGRU.FREEZE_WORD_VECTORS = frozen
    cfg.MODEL.VLNMS.BIGRU.SPLIT = "spaces"
    encoder = BiGRU(cfg)
    assert encoder.embedding.weight.requires_grad == trained
    assert encoder.split == "spaces" and encoder.gru.weight_ih_l0.requires_grad


def config(**keys):
    cfg = get_cfg()
    add_vlnms_config(cfg)
    cfg.MODEL.VLNMS.update(keys)
    return cfg


def test_the_encoder_is_built_as_the_config_says(tmp_path):
    Vocabulary(WORDS).save(tmp_path / "vocab.json")
    cfg = config(VOCAB=str(tmp_path / "vocab.json"), MAX_WORDS=2)
    cfg.MODEL.VLNMS.BIGRU.EMBED_DIM, cfg.MODEL.VLNMS.BIGRU.HIDDEN_DIM = 7, 3
    encoder = build_text_encoder(cfg)
    assert encoder.vocabulary.words[2:] == WORDS
    assert encoder.embedding.weight.shape == (len(WORDS) + 2, 7)
    assert encoder.output_dim == 6 and encoder(["a red cup"]).words.shape == (1, 2, 6)


def test_a_config_without_a_vocabulary_warns_and_names_the_key(caplog):
    with caplog.at_level(logging.WARNING):
        encoder = build_text_encoder(config())
    assert "MODEL.VLNMS.VOCAB is empty" in caplog.text
    assert len(encoder.vocabulary) == 2


def test_a_missing_vocabulary_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "no.json")):
        build_text_encoder(config(VOCAB=str(tmp_path / "no.json")))


def test_a_checkpoint_with_the_same_vocabulary_loads():
    source, target = make_encoder(), make_encoder()
    with torch.no_grad():
        source.embedding.weight.add_(1)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.embedding.weight, source.embedding.weight)


def test_a_checkpoint_of_equal_size_but_other_words_is_refused():
    other = make_encoder(words=(*WORDS[1:], WORDS[0]))
    with pytest.raises(ValueError, match=r"another vocabulary .*MODEL\.VLNMS\.VOCAB"):
        make_encoder().load_state_dict(other.state_dict())


# --- TextFeatures, pad_words -------------------------------------------------------------------


def features_of(*lengths: int) -> TextFeatures:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TextFeatures(torch.randn(len(lengths), max(lengths), 3) * mask[:, :, None], mask)


@pytest.mark.parametrize("index", [[2, 0, 2], torch.tensor([2, 0, 2])])
def test_indexing_takes_queries_and_cuts_to_the_longest_of_them(index):
    features = features_of(2, 5, 1)
    taken = features[index]
    assert len(taken) == 3 and taken.mask.sum(dim=1).tolist() == [1, 2, 1]
    assert torch.equal(taken.words, features.words[[2, 0, 2], :2])
    assert torch.equal(taken.mask, features.mask[[2, 0, 2], :2])


def test_indexing_no_query_or_only_empty_ones_leaves_no_words():
    features = features_of(2, 0)
    assert features[[]].words.shape == (0, 0, 3) and features[[]].mask.shape == (0, 0)
    assert features[[1]].words.shape == (1, 0, 3) and len(features[[1]]) == 1


def test_pad_words():
    ids, mask, lengths = pad_words([[5, 6], [], [7]], torch.device("cpu"))
    assert lengths.tolist() == [2, 0, 1]
    assert ids.tolist() == [[5, 6], [0, 0], [7, 0]] and ids.dtype == torch.int64
    assert mask.tolist() == [[True, True], [False, False], [True, False]]
    ids, mask, lengths = pad_words([], torch.device("cpu"))
    assert lengths.shape == (0,)
    assert ids.shape == mask.shape == (0, 0)


# --- averaging --------------------------------------------------------------------------------


@pytest.mark.parametrize("multi_avg_fn", [get_ema_multi_avg_fn(0.999), get_swa_multi_avg_fn()])
def test_averaged_weights_belong_to_the_vocabulary(multi_avg_fn):
    encoder = make_encoder()
    averaged = AveragedModel(encoder, multi_avg_fn=multi_avg_fn, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(encoder)
    state = averaged.module.state_dict()
    assert torch.equal(state["vocabulary_fingerprint"], torch.tensor(Vocabulary(WORDS).fingerprint))
    make_encoder().load_state_dict(state, strict=True)
    with pytest.raises(ValueError, match="another vocabulary"):
        make_encoder(words=WORDS[::-1]).load_state_dict(state)


@pytest.mark.parametrize("decay", [0.5, 0.999, 0.9999])
def test_averages_of_state_dicts_belong_to_the_vocabulary(decay):
    """As short scripts average: every entry, in float32, whose errors add up."""
    average = state = make_encoder().state_dict()
    for _ in range(2000):
        average = {k: decay * average[k] + (1 - decay) * state[k] for k in state}
    make_encoder().load_state_dict(average, strict=True)
    with pytest.raises(ValueError, match="another vocabulary"):
        make_encoder(words=WORDS[::-1]).load_state_dict(average)


def test_a_state_dict_has_the_entries_of_the_first_release():
    encoder = make_encoder()
    assert not list(encoder.buffers())
    entry = encoder.state_dict()["vocabulary_fingerprint"]
    assert (
        entry.dtype == torch.int64
        and entry.shape == ()
        and int(entry) == Vocabulary(WORDS).fingerprint
    )
    near = {**encoder.state_dict(), "vocabulary_fingerprint": entry + 1}
    with pytest.raises(ValueError, match="another vocabulary"):
        encoder.load_state_dict(near)
    lacking = {k: v for k, v in encoder.state_dict().items() if k != "vocabulary_fingerprint"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"vocabulary_fingerprint"'):
        encoder.load_state_dict(lacking)
