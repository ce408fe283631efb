"""The nouns and noun chunks of texts, by spaCy (paper, Sec. 3.3)."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ..file_io import shown

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc, Token
    from thinc.api import NumpyOps

KEY = "MODEL.VLNMS.PSEUDO_GT.SPACY_PIPELINE"
EMBEDDED = Path(__file__).parent / "en_ud_pos"
NOUN_POS = ("NOUN", "NUM", "PRON", "PROPN")
UNUSED = (
    "ner", "entity_linker", "entity_ruler", "future_entity_ruler", "span_ruler", "spancat",
    "textcat", "textcat_multilabel", "lemmatizer", "trainable_lemmatizer", "senter", "sentencizer",
)  # fmt: skip
"""Components that give neither parts of speech nor noun chunks."""
BATCH = 128
FEW = 32  # at most this many texts are read with BLIS, see `_read_here`
MAX_CHARS = 2000  # longer texts are read in pieces, to bound memory
MIN_FOR_PROCESSES = 2048  # fewer texts are read faster than processes start
CHUNK = 1024  # texts that a process reads at a time


class NounFinder:
    """Finds the nouns of texts.

    Args:
        pipeline: name of an installed spaCy pipeline, such as en_core_web_sm, or its folder; empty
            for the one that comes with vlnms_d2 (`en_ud_pos`).
        pos: the coarse parts of speech that count as nouns.
        batch_size: texts that spaCy reads together.
        processes: processes that share many texts; where a process cannot fork, as in a data
            loader's workers, it reads all texts itself. (spaCy's own `n_process` sends whole
            documents back, which takes longer than reading them in one process.)

    Raises:
        ImportError: spaCy or the pipeline is not installed.
        ValueError: the pipeline cannot be loaded or gives no parts of speech, or `processes` is
            less than 1.
    """

    def __init__(
        self,
        pipeline: str = "",
        *,
        pos: Sequence[str] = NOUN_POS,
        batch_size: int = BATCH,
        processes: int = 1,
    ):
        if processes < 1:
            raise ValueError(f"the number of processes is {processes}, expected at least 1")
        self.pipeline = pipeline
        self.pos = tuple(pos)
        self.batch_size = batch_size
        self.processes = processes
        self._nlp, self._ops = _load(pipeline)
        has_parser = self._nlp.has_pipe("parser")
        self._parses = has_parser and self._nlp.vocab.get_noun_chunks is not None

    def nouns(self, texts: Iterable[str]) -> list[list[str]]:
        """For each text its nouns in lower case, in order, with repetitions.

        A word without letters and digits is never a noun, whatever its tag.
        """
        return self._read(texts, "_nouns_of")

    def tagged(self, texts: Iterable[str]) -> list[list[tuple[str, str]]]:
        """For each text all its tokens in lower case with their coarse parts of speech."""
        return self._read(texts, "_tags_of")

    def noun_chunks(self, texts: Iterable[str]) -> list[list[str]]:
        """For each text its noun chunks in lower case, in order.

        They come from the pipeline's parser, or from `chunks_by_tags` if it has none.
        """
        return self._read(texts, "_chunks_of")

    def __deepcopy__(self, memo) -> NounFinder:
        return self  # immutable, so copies of a model share it

    def __reduce__(self):
        make = partial(type(self), self.pipeline, pos=self.pos, batch_size=self.batch_size)
        return partial(make, processes=self.processes), ()

    def _nouns_of(self, doc: Doc) -> list[str]:
        nouns = (token for token in doc if token.pos_ in self.pos)
        return [token.lower_ for token in nouns if any(map(str.isalnum, token.text))]

    def _tags_of(self, doc: Doc) -> list[tuple[str, str]]:
        return [(token.lower_, token.pos_) for token in doc]

    def _chunks_of(self, doc: Doc) -> list[str]:
        if self._parses:
            return [chunk.text.lower() for chunk in doc.noun_chunks]
        return chunks_by_tags(doc)

    def _read(self, texts: Iterable[str], method: str) -> list[list]:
        """The results of a method above for each text. White space is normalised, and equal texts
        are read once."""
        keys = [" ".join(text.split()) for text in texts]
        distinct = list(dict.fromkeys(keys))
        if self.processes > 1 and len(distinct) >= MIN_FOR_PROCESSES and _can_fork():
            results = self._read_in_processes(distinct, method)
        else:
            results = self._read_here(distinct, method)
        result_of = dict(zip(distinct, results, strict=True))
        return [list(result_of[key]) for key in keys]

    def _read_here(self, texts: Sequence[str], method: str) -> list[list]:
        pieces = [(piece, i) for i, text in enumerate(texts) for piece in _pieces(text)]
        # For many texts, NumPy's matrix product takes half the time of BLIS. For few there is
        # little to gain, and its threads would keep cores busy that a detector could use.
        self._ops.use_blis = len(pieces) <= FEW
        disabled = [] if method == "_chunks_of" else ["parser"]
        docs = self._nlp.pipe(pieces, as_tuples=True, batch_size=self.batch_size, disable=disabled)
        results: list[list] = [[] for _ in texts]
        for doc, i in docs:
            results[i] += getattr(self, method)(doc)
        return results

    def _read_in_processes(self, texts: list[str], method: str) -> list[list]:
        chunks = [(texts[i : i + CHUNK], method) for i in range(0, len(texts), CHUNK)]
        context = multiprocessing.get_context("fork")  # so that nothing has to be loaded again
        gc.freeze()  # keeps the forks' garbage collectors from copying what they share with us
        try:
            with ProcessPoolExecutor(
                self.processes, context, _set_forked, (self, os.getpid())
            ) as pool:
                return list(chain.from_iterable(pool.map(_read_forked, chunks)))
        finally:
            gc.unfreeze()


_forked: NounFinder | None = None
# Loaded here and not in a process that has just been forked.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _set_forked(finder: NounFinder, parent: int) -> None:
    global _forked
    _forked = finder
    end_with(parent)  # a killed parent would leave this process waiting forever


def end_with(parent: int) -> None:
    """In a new process: end when the process that started it does, however that ends (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before that
            os._exit(1)


def _read_forked(chunk: tuple[list[str], str]) -> list[list]:
    return _forked._read_here(*chunk)


def _can_fork() -> bool:
    forks = "fork" in multiprocessing.get_all_start_methods()
    return forks and not multiprocessing.current_process().daemon


def chunks_by_tags(doc: Doc) -> list[str]:
    """Noun chunks in lower case by parts of speech alone.

    A chunk is a longest run of DET? (ADJ | NUM | NOUN | PROPN | participle)* (NOUN | PROPN), with
    hyphens inside words. A participle directly after a noun begins a clause, not a chunk: "man
    wearing red hat" gives "man" and "red hat"; "the parked car" is one chunk.
    """
    chunks: list[str] = []
    run: list[Token] = []

    def end_run() -> None:
        while run and run[-1].pos_ not in ("NOUN", "PROPN"):
            run.pop()
        if run:
            chunks.append(doc[run[0].i : run[-1].i + 1].text.lower())
        run.clear()

    for token in doc:
        after_noun = bool(run) and run[-1].pos_ in ("NOUN", "PROPN")
        if token.pos_ == "DET":
            end_run()
            run.append(token)
        elif (
            token.pos_ in ("ADJ", "NUM", "NOUN", "PROPN")
            or (_is_participle(token) and not after_noun)
            or (run and _is_hyphen(token))
        ):
            run.append(token)
        else:
            end_run()
    end_run()
    return chunks


def _is_participle(token: Token) -> bool:
    return token.pos_ == "VERB" and token.morph.get("VerbForm") in (["Part"], ["Ger"])


def _is_hyphen(token: Token) -> bool:
    inside = token.i > 0 and not token.nbor(-1).whitespace_ and not token.whitespace_
    return token.text == "-" and inside


def _pieces(text: str) -> Iterator[str]:
    """The text, or pieces of at most `MAX_CHARS` of it, split between words where there are any."""
    while len(text) > MAX_CHARS:
        end = text.rfind(" ", 0, MAX_CHARS + 1)
        end = end if end > 0 else MAX_CHARS
        yield text[:end]
        text = text[end:].lstrip(" ")
    if text:
        yield text


def _load(pipeline: str) -> tuple[Language, NumpyOps]:
    """The pipeline and its operations on the CPU (thinc's), which choose the matrix product."""
    try:
        import spacy
    except ImportError as error:
        raise ImportError(
            'finding nouns needs spaCy. Install it with\n    pip install "vlnms_d2[nlp]"'
        ) from error
    source = pipeline or EMBEDDED
    if not (Path(source).is_dir() or spacy.util.is_package(str(source))):
        if not pipeline:
            raise ValueError(
                f"no pipeline at {EMBEDDED}, where vlnms_d2 keeps its own; install vlnms_d2 again"
            )
        raise ImportError(
            f"{KEY} is {shown(pipeline)}: expected an installed spaCy pipeline, its folder, or "
            "nothing for the one that comes with vlnms_d2. To install one:\n"
            "    python -m spacy download en_core_web_sm"
        )
    try:
        nlp = spacy.load(source, exclude=UNUSED)
        ops = _share_ops(nlp)
        tagged = nlp("the red cup").has_annotation("POS", require_complete=True)
    except Exception as error:  # spaCy and the readers below it raise all kinds of errors
        raise ValueError(_not_usable(source, f"loading it gave: {error}")) from error
    if not tagged:
        raise ValueError(
            _not_usable(source, f"its components {nlp.pipe_names} give no parts of speech (POS)")
        )
    return nlp, ops


def _share_ops(nlp: Language) -> NumpyOps:
    """Let all parts of the pipeline that run on the CPU share their operations; return these."""
    from thinc.api import NumpyOps

    ops = NumpyOps()
    for _, component in nlp.pipeline:
        model = getattr(component, "model", None)
        for part in model.walk() if model is not None else ():
            if type(part.ops) is NumpyOps:
                part.ops = ops
    return ops


def _not_usable(source: str | Path, why: str) -> str:
    return (
        f"{KEY} stands for {shown(str(source))}: expected a spaCy pipeline that gives coarse parts "
        f"of speech, but {why}. Give another one (python -m spacy download en_core_web_sm), or "
        "nothing for the one that comes with vlnms_d2"
    )
