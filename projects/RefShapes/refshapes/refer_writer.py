"""Writing expressions in the layout of REFER: `refs(<style>).p` and, beside them, the contexts
that REFER does not hold."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlnms_d2.data.datasets.refshapes import CATEGORIES
from vlnms_d2.file_io import atomic_write, write_json

from .scene import Scene, SceneObject
from .writer import image_file_name

PICKLE_PROTOCOL = 2  # that of the files REFER distributes
CONTEXTS_VERSION = 1


class Sentence(NamedTuple):
    """A sentence as written, as meant (they differ by a misspelling) and the ids of the
    contextual objects it names."""

    written: str
    meant: str
    context: tuple[int, ...]


class Ref(NamedTuple):
    """A referent of a scene with its sentences."""

    scene: Scene
    referent: SceneObject
    sentences: Sequence[Sentence]


def refs_file_name(style: str) -> str:
    """Name of the REFER file of a style, as in `refs(refcoco+).p`."""
    return f"refs({style}).p"


CONTEXTS_FILE_NAME = "contexts.json"


def write_refer(refs: Mapping[str, Sequence[Ref]], out_dir: Path) -> None:
    """Writes one REFER file per style and `contexts.json`, each whole or not at all.

    `contexts.json` holds "contexts" (sentence id, as text, to annotation ids) and "misspelt"
    (sentence id to the sentence as it was meant). Ref ids and sentence ids count through all
    styles, so one file of contexts serves all of them.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    contexts: dict[str, list[int]] = {}
    misspelt: dict[str, str] = {}
    ref_id = 0
    for style, style_refs in refs.items():
        entries = []
        for ref in style_refs:
            sentences = []
            for sentence in ref.sentences:
                sent_id = len(contexts)
                contexts[str(sent_id)] = list(sentence.context)
                if sentence.written != sentence.meant:
                    misspelt[str(sent_id)] = sentence.meant
                sentences.append(_sentence_entry(sent_id, sentence.written, style))
            entries.append(_ref_entry(ref_id, ref, sentences))
            ref_id += 1
        with atomic_write(out_dir / refs_file_name(style)) as file:
            pickle.dump(entries, file, protocol=PICKLE_PROTOCOL)
    sidecar = {"version": CONTEXTS_VERSION, "contexts": contexts, "misspelt": misspelt}
    write_json(out_dir / CONTEXTS_FILE_NAME, sidecar)


def _sentence_entry(sent_id: int, written: str, style: str) -> dict[str, Any]:
    raw = f"{written[0].upper()}{written[1:]}." if style == "refcocog" else written
    # A pickle names a string it has seen by reference, and knows it by identity: interned
    # strings make the bytes depend on what the strings say, not on how they came about.
    return {
        "sent_id": sent_id,
        "sent": sys.intern(written),
        "raw": sys.intern(raw),
        "tokens": [sys.intern(token) for token in written.split()],
    }


def _ref_entry(ref_id: int, ref: Ref, sentences: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "ref_id": ref_id,
        "ann_id": ref.referent.id,
        "category_id": CATEGORIES.index(ref.referent.category) + 1,
        "image_id": ref.scene.image_id,
        "file_name": sys.intern(image_file_name(ref.scene.image_id)),
        "split": sys.intern(ref.scene.split),
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "sentences": sentences,
    }
