"""The nouns and noun chunks of texts, by spaCy (SPEC section 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc, Token
    from thinc.api import NumpyOps

KEY = "MODEL.VLNMS.PSEUDO_GT.SPACY_PIPELINE"
EMBEDDED = Path(__file__).parent / "en_ud_pos"
NOUN_POS = ("NOUN", "NUM", "PRON", "PROPN")
UNUSED = (
    "ner",
    "entity_linker",
    "entity_ruler",
    "future_entity_ruler",
    "span_ruler",
    "spancat",
    "textcat",
    "textcat_multilabel",
    "lemmatizer",
    "trainable_lemmatizer",
    "senter",
    "sentencizer",
)
"""Components that give neither parts of speech nor noun chunks."""
BATCH = 128
FEW = 32
"""Up to so many texts are read without NumPy's matrix product, see `_read`."""
MAX_CHARS = 2000  # read at once, which bounds memory; longer texts are read in pieces


class NounFinder:
    """Finds the nouns of texts.

    Args:
        pipeline: name of an installed spaCy pipeline, such as en_core_web_sm, or its folder; empty
            for the one that comes with vlnms_d2 (`en_ud_pos`).
        pos: the coarse parts of speech that count as nouns.
        batch_size: texts that spaCy reads together.

    Raises:
        ImportError: spaCy or the pipeline is not installed.
        ValueError: the pipeline cannot be loaded or gives no parts of speech.
    """

    def __init__(
        self, pipeline: str = "", *, pos: Sequence[str] = NOUN_POS, batch_size: int = BATCH
    ):
        self.pipeline = pipeline
        self.pos = tuple(pos)
        self.batch_size = batch_size
        self._nlp, self._ops = _load(pipeline)
        self._parses = _has_noun_chunks(self._nlp)

    def nouns(self, texts: Iterable[str]) -> list[list[str]]:
        """Per text its nouns in lower case, in order, repeated ones too.

        A word without letters and digits is none, whatever its tag.
        """
        return self._read(texts, self._nouns_of, disable=["parser"])

    def tagged(self, texts: Iterable[str]) -> list[list[tuple[str, str]]]:
        """Per text its words in lower case with their coarse parts of speech, all tokens."""
        return self._read(texts, lambda doc: [(t.lower_, t.pos_) for t in doc], ["parser"])

    def noun_chunks(self, texts: Iterable[str]) -> list[list[str]]:
        """Per text its noun chunks in lower case, in order.

        Those of the pipeline's parser; without a parser those that `chunks_by_tags` finds.
        """
        if self._parses:
            return self._read(texts, lambda doc: [c.text.lower() for c in doc.noun_chunks])
        return self._read(texts, chunks_by_tags)

    def chunk_heads(self, texts: Iterable[str]) -> list[list[str]]:
        """Per text the last word of each noun chunk, which says what the chunk is."""
        return [[chunk.split()[-1] for chunk in own] for own in self.noun_chunks(texts)]

    def __deepcopy__(self, memo) -> NounFinder:
        # Nothing of it changes; a copy of a model needs no second one.
        return self

    def __reduce__(self):
        return _rebuild, (type(self), self.pipeline, self.pos, self.batch_size)

    def _nouns_of(self, doc: Doc) -> list[str]:
        return [
            token.lower_
            for token in doc
            if token.pos_ in self.pos and any(map(str.isalnum, token.text))
        ]

    def _read(
        self,
        texts: Iterable[str],
        words_of: Callable[[Doc], list],
        disable: Sequence[str] = (),
    ) -> list[list]:
        """What is found in each text; each distinct one is read once, white space made even."""
        keys = [" ".join(text.split()) for text in texts]
        pieces = [(piece, key) for key in dict.fromkeys(keys) for piece in _pieces(key)]
        found: dict[str, list] = {key: [] for key in keys}
        # NumPy multiplies matrices of many texts in half the time of BLIS. Of few there is little
        # to gain, and its threads would keep cores busy for a while that a detector has use for.
        self._ops.use_blis = len(pieces) <= FEW
        docs = self._nlp.pipe(
            pieces, as_tuples=True, batch_size=self.batch_size, disable=list(disable)
        )
        for doc, key in docs:
            found[key] += words_of(doc)
        return [list(found[key]) for key in keys]


def chunks_by_tags(doc: Doc) -> list[str]:
    """Noun chunks in lower case by parts of speech alone.

    A chunk is a longest run of DET? (ADJ | NUM | NOUN | PROPN | participle)* (NOUN | PROPN), with
    hyphens inside words. A participle right after a noun begins a clause, not a chunk: "man wearing
    red hat" gives "man" and "red hat", "the parked car" is one.
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


def _rebuild(cls: type[NounFinder], pipeline: str, pos: Sequence[str], batch_size: int):
    return cls(pipeline, pos=pos, batch_size=batch_size)


def _load(pipeline: str) -> tuple[Language, NumpyOps]:
    """The pipeline and what multiplies its matrices on the CPU."""
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
                f"no pipeline at {EMBEDDED}, where vlnms_d2 has its own; install vlnms_d2 again"
            )
        raise ImportError(
            f"{KEY} is {pipeline!r}: expected an installed spaCy pipeline, its folder, or nothing "
            "for the one that comes with vlnms_d2. To install one:\n"
            "    python -m spacy download en_core_web_sm"
        )
    try:
        nlp = spacy.load(source, exclude=UNUSED)
        ops = _share_ops(nlp)
        tagged = nlp("the red cup").has_annotation("POS", require_complete=True)
    except Exception as error:  # spaCy and the readers below it raise all sorts of things
        raise ValueError(_not_usable(source, f"loading it gave: {error}")) from error
    if not tagged:
        raise ValueError(
            _not_usable(source, f"its components {nlp.pipe_names} give no parts of speech (POS)")
        )
    return nlp, ops


def _share_ops(nlp: Language) -> NumpyOps:
    """Give all parts of the pipeline that run on the CPU the same operations, and return these."""
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
        f"{KEY} stands for {str(source)!r}: expected a spaCy pipeline that gives coarse parts of "
        f"speech, but {why}. Give another one (python -m spacy download en_core_web_sm), or "
        "nothing for the one that comes with vlnms_d2"
    )


def _has_noun_chunks(nlp: Language) -> bool:
    """Whether the pipeline parses a language whose noun chunks spaCy knows."""
    return nlp.has_pipe("parser") and nlp.vocab.get_noun_chunks is not None
