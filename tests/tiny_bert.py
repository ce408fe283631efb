"""Small models of the BERT family with random weights, in the files that transformers writes."""

import tokenizers
import torch
import transformers
from torch import nn

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 34,
}
MODELS = {
    "bert": (transformers.BertModel, transformers.BertConfig, SIZES),
    "roberta": (transformers.RobertaModel, transformers.RobertaConfig, SIZES),
    "distilbert": (
        transformers.DistilBertModel,
        transformers.DistilBertConfig,
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 34},
    ),
    "electra": (
        transformers.ElectraModel,
        transformers.ElectraConfig,
        SIZES | {"embedding_size": 8},
    ),
    "deberta": (
        transformers.DebertaV2Model,
        transformers.DebertaV2Config,
        SIZES
        | {"position_biased_input": False, "relative_attention": True, "type_vocab_size": 0}
        | {"pos_att_type": ["p2c", "c2p"]},
    ),
}
WORDS = ["a", "the", "red", "cup", "left", "man", "'", "s", ",", "re", "##d", "##dish"]


def make_tokenizer(kind="bert", words=WORDS):
    """A WordPiece tokenizer with the special tokens of BERT or of RoBERTa (whose [PAD] is 1)."""
    names = ("<s>", "<pad>", "</s>", "<unk>") if kind == "roberta" else None
    cls, pad, sep, unk = names or ("[CLS]", "[PAD]", "[SEP]", "[UNK]")
    special = [cls, pad, sep, unk] if names else [pad, unk, cls, sep]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token=unk))
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{cls} $A {sep}", special_tokens=[(t, vocabulary[t]) for t in (cls, sep)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token=cls, pad_token=pad, sep_token=sep, unk_token=unk
    )


def save_model(folder, kind="bert", seed=0, words=WORDS, **changes):
    """A model of random weights with its tokenizer, as `save_pretrained` writes them."""
    model_class, config_class, sizes = MODELS[kind]
    tokenizer = make_tokenizer(kind, words)
    config = config_class(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **(sizes | changes)
    )
    torch.manual_seed(seed)
    model = model_class(config)
    for parameter in model.parameters():  # biases and LayerNorms too
        nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
