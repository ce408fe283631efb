"""Training of the small spaCy pipeline that tags the nouns of referring expressions.

Expressions are lower-case fragments, whereas a treebank consists of sentences. Half of the training
text is therefore lower-cased, and noun phrases are cut out of the dependency trees.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random

import spacy
from spacy.language import Language
from spacy.scorer import Scorer
from spacy.tokens import Doc, Token
from spacy.training import Example
from spacy.training.converters import conllu_to_docs
from spacy.util import fix_random_seed, minibatch
from thinc.api import Adam

from vlnms_d2.file_io import claim, refuse_foreign
from vlnms_d2.language.nouns import NOUN_POS

SOURCE = (
    "It belongs to the treebank UD English EWT: https://universaldependencies.org, repository "
    "UD_English-EWT."
)
SPLITS = ("train", "dev", "test")
COMPONENT = "morphologizer"
ARTICLES = {"a", "an", "the"}
# Words that may open the subtree of a noun without being part of the noun phrase.
LEADING = {"ADP", "CCONJ", "SCONJ", "PUNCT", "PART"}
MAX_FRAGMENT_WORDS = 12
LOWER_SHARE, UNPUNCTUATED_SHARE, NO_ARTICLE_SHARE = 0.5, 0.5, 0.5
FRAGMENTS_PER_SENTENCE = 2
BLURRED_SHARE = 0.5  # of the words that occur once, which stand in for unknown words
MIN_BLURRED_LETTERS = 5
WARM_UP = 0.05  # of all steps
MODEL = {
    "@architectures": "spacy.Tagger.v2",
    "tok2vec": {
        "@architectures": "spacy.Tok2Vec.v2",
        "embed": {
            "@architectures": "spacy.MultiHashEmbed.v2",
            "width": 96,
            "attrs": ["NORM", "PREFIX", "SUFFIX", "SHAPE"],
            "rows": [4000, 500, 2000, 500],
            "include_static_vectors": False,
        },
        "encode": {
            "@architectures": "spacy.MaxoutWindowEncoder.v2",
            "width": 96,
            "window_size": 1,
            "maxout_pieces": 3,
            "depth": 3,
        },
    },
}


def read_treebank(folder: Path, split: str) -> list[Doc]:
    """The sentences of one file of the treebank, with their trees.

    The only morphological features kept are participle and gerund, as the pipeline is used for
    nothing else.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not CoNLL-U with parts of speech and heads.
    """
    path = folder / f"en_ewt-ud-{split}.conllu"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (--treebank). {SOURCE}")
    try:
        docs = list(conllu_to_docs(path.read_text(encoding="utf-8"), n_sents=1, no_print=True))
    except (ValueError, IndexError, KeyError) as error:  # raised by spaCy's reader
        raise ValueError(
            f"{path}: expected CoNLL-U, ten columns between tabs; spaCy's reader said: {error}. "
            f"Fetch the file again. {SOURCE}"
        ) from error
    if not docs or not all(token.pos_ for doc in docs for token in doc):
        raise ValueError(
            f"{path}: expected sentences whose words all have a part of speech (column 4). {SOURCE}"
        )
    for doc in docs:
        for token in doc:
            form = token.morph.get("VerbForm")
            token.set_morph(f"VerbForm={form[0]}" if form and form[0] in ("Part", "Ger") else "")
    return docs


def noun_phrases(doc: Doc) -> list[list[Token]]:
    """The subtrees of nouns without leading prepositions and conjunctions: "in the red car" gives
    "the red car". Discontinuous subtrees and those longer than `MAX_FRAGMENT_WORDS` are skipped."""
    phrases = []
    for head in doc:
        if head.pos_ not in ("NOUN", "PROPN"):
            continue
        tokens = list(head.subtree)
        if tokens[-1].i - tokens[0].i + 1 != len(tokens):
            continue
        while tokens[0].pos_ in LEADING:
            del tokens[0]
        while tokens[-1].pos_ == "PUNCT":
            del tokens[-1]
        if len(tokens) <= MAX_FRAGMENT_WORDS:
            phrases.append(tokens)
    return phrases


def without_articles(tokens: Sequence[Token]) -> list[Token]:
    """The words without articles."""
    return [t for t in tokens if not (t.pos_ == "DET" and t.text.lower() in ARTICLES)]


def without_end(tokens: Sequence[Token]) -> list[Token]:
    """The words without final punctuation; unchanged if there is only punctuation."""
    last = max((i for i, t in enumerate(tokens) if t.pos_ != "PUNCT"), default=len(tokens) - 1)
    return list(tokens[: last + 1])


def as_text(nlp: Language, tokens: Sequence[Token], lower: bool, words: Sequence[str] = ()) -> Doc:
    """Words of a sentence as a separate text.

    Args:
        nlp: the pipeline whose vocabulary is used.
        tokens: the words, in order.
        lower: whether to lower-case them.
        words: replacements for the words, if any.
    """
    words = words or [t.text for t in tokens]
    return Doc(
        nlp.vocab,
        words=[word.lower() for word in words] if lower else list(words),
        # Words that were removed leave a space.
        spaces=[bool(a.whitespace_) or b.i != a.i + 1 for a, b in pairwise(tokens)] + [False],
        pos=[t.pos_ for t in tokens],
        morphs=[str(t.morph) for t in tokens],
    )


class Augmenter:
    """Training texts that resemble expressions, augmented anew in each epoch.

    Args:
        docs: sentences of the treebank.
        rng: random number generator.
    """

    def __init__(self, docs: Sequence[Doc], rng: Random):
        self.rng = rng
        self.sentences = [(list(doc), noun_phrases(doc)) for doc in docs]
        self.counts = Counter(token.text.lower() for doc in docs for token in doc)

    def epoch(self, nlp: Language) -> Iterator[Doc]:
        """Each sentence once with some of its noun phrases, in random order."""
        rng = self.rng
        for i in rng.sample(range(len(self.sentences)), len(self.sentences)):
            sentence, phrases = self.sentences[i]
            if rng.random() < UNPUNCTUATED_SHARE:
                sentence = without_end(sentence)
            yield self._text(nlp, sentence)
            for phrase in rng.sample(phrases, min(len(phrases), FRAGMENTS_PER_SENTENCE)):
                if rng.random() < NO_ARTICLE_SHARE:
                    phrase = without_articles(phrase)
                yield self._text(nlp, phrase)

    def _text(self, nlp: Language, tokens: Sequence[Token]) -> Doc:
        lower = self.rng.random() < LOWER_SHARE
        return as_text(nlp, tokens, lower, [self._blur(t) for t in tokens])

    def _blur(self, token: Token) -> str:
        """The word; rare words are often replaced by a made-up word with the same first and last
        letters."""
        word = token.text
        rare = self.counts[token.text.lower()] == 1 and len(word) >= MIN_BLURRED_LETTERS
        if not (rare and word.isalpha() and self.rng.random() < BLURRED_SHARE):
            return word
        middle = self.rng.choices(string.ascii_lowercase, k=len(word) - 4)
        return word[0] + "".join(middle) + word[-3:]


def make_pipeline(docs: Sequence[Doc], seed: int) -> Language:
    """An untrained pipeline with the labels of the sentences."""
    fix_random_seed(seed)
    nlp = spacy.blank("en")
    nlp.add_pipe(COMPONENT, config={"model": MODEL, "overwrite": True, "extend": False})
    texts = [as_text(nlp, list(doc), lower=False) for doc in docs]
    nlp.initialize(lambda: [Example(text, text) for text in texts])
    return nlp


def train(docs: Sequence[Doc], *, epochs: int, seed: int, batch: int = 64) -> Language:
    """A pipeline trained on sentences.

    Args:
        docs: sentences with trees, as `read_treebank` gives them.
        epochs: passes over the sentences.
        seed: of weights, order, augmentation and dropout.
        batch: texts per step.
    """
    nlp = make_pipeline(docs, seed)
    augmenter = Augmenter(docs, Random(seed))
    peak, step = 2e-3, 0
    optimizer = Adam(peak, L2=0.01, L2_is_weight_decay=True, grad_clip=1.0, use_averages=True)
    for epoch in range(epochs):
        texts = list(augmenter.epoch(nlp))
        augmenter.rng.shuffle(texts)
        total = epochs * -(-len(texts) // batch)
        losses: dict[str, float] = {}
        for group in minibatch(texts, batch):
            step += 1
            done = step / total
            optimizer.learn_rate = peak * min(done / WARM_UP, max(1 - done, 0.01))
            nlp.update([Example(bare(text), text) for text in group], drop=0.15, sgd=optimizer,
                       losses=losses)  # fmt: skip
        print(f"epoch {epoch + 1} of {epochs}: loss {losses['morphologizer']:.0f}", flush=True)
    with nlp.use_params(optimizer.averages):
        return spacy.util.load_model_from_config(nlp.config, auto_fill=True).from_bytes(
            nlp.to_bytes(exclude=["vocab"]), exclude=["vocab"]
        )


def bare(doc: Doc) -> Doc:
    """The words without their annotation."""
    return Doc(doc.vocab, words=[t.text for t in doc], spaces=[bool(t.whitespace_) for t in doc])


def evaluate(nlp: Language, docs: Sequence[Doc]) -> dict[str, float]:
    """Accuracy in percent on sentences as they are, lower-cased, and on fragments.

    Fragments are one noun phrase of each sentence, lower-cased. The pipeline's tokenizer splits the
    text; spaCy's scorer excludes words that it splits differently from the treebank. `nouns` is the
    accuracy of the binary decision whether `NounFinder` would return the word.
    """
    rng = Random(0)
    sentences = [list(doc) for doc in docs]
    phrases = [rng.choice(candidates) for doc in docs if (candidates := noun_phrases(doc))]
    groups = {
        "as_is": [as_text(nlp, tokens, lower=False) for tokens in sentences],
        "lower": [as_text(nlp, tokens, lower=True) for tokens in sentences],
        "fragments": [as_text(nlp, tokens, lower=True) for tokens in phrases],
    }
    scores = {}
    for name, golds in groups.items():
        tagged = nlp.pipe([gold.text for gold in golds], batch_size=256)
        examples = [Example(doc, gold) for doc, gold in zip(tagged, golds, strict=True)]
        pos = Scorer.score_token_attr(examples, "pos")["pos_acc"]
        nouns = Scorer.score_token_attr(
            examples, "noun", getter=lambda token, _: str(token.pos_ in NOUN_POS)
        )["noun_acc"]
        scores |= {f"{name}_pos": round(100 * pos, 2), f"{name}_nouns": round(100 * nouns, 2)}
    return scores


def make_tagger(treebank: Path, out: Path, *, epochs: int, seed: int) -> None:
    """Train a pipeline on a treebank, print its accuracy and save it.

    Args:
        treebank: folder of the CoNLL-U files.
        out: folder of the pipeline.
        epochs: passes over the training sentences.
        seed: see `train`.

    Raises:
        OSError, ValueError: see `read_treebank`; or the folder cannot be written.
    """
    name = re.sub(r"\W+", "_", out.resolve().name)
    outputs = [out / name for name in ("config.cfg", "meta.json", "tokenizer", COMPONENT)]
    refuse_foreign(*outputs)
    docs = {split: read_treebank(treebank, split) for split in SPLITS}
    claim(*outputs)
    nlp = train(docs["train"], epochs=epochs, seed=seed)
    performance = {split: evaluate(nlp, docs[split]) for split in ("dev", "test")}
    for split, scores in performance.items():
        for key, percent in scores.items():
            print(f"{split:5}{key:17}{percent:6.2f}")
    source = {
        "name": "UD English EWT",
        "url": "https://universaldependencies.org",
        "license": "CC BY-SA 4.0",
    }
    nlp.meta.update(
        name=name,
        version="1.0.0",
        description="Coarse parts of speech, trained for lower-case fragments",
        author="the vlnms_d2 authors",
        license="CC BY-SA 4.0",
        sources=[source],
        spacy_version=">=3.8.0,<3.9.0",
        performance=performance,
    )
    # Words are hashed, so the vocabulary is not needed.
    nlp.to_disk(out, exclude=["vocab"])
