"""Synonyms of category names from WordNet, for `vlnms_d2.language.synonyms`.

A word names a category if one of its likely senses is a kind of the category ("egret": bird), and
names several if one is a superordinate of theirs ("vehicle": bus, car, truck). How likely a sense
is follows from its frequency in WordNet's tagged texts, and from its lexicographer file, because a
caption is more likely about things than about acts or ideas.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from vlnms_d2.file_io import atomic_write, claim, refuse_foreign
from vlnms_d2.language.synonyms import singular, words_of

SOURCES = Path(__file__).parents[1] / "synonym_sources.json"
"""COCO's synsets, and what WordNet does not have."""

LICENCE = (
    "Made from WordNet 3.0 (Copyright 2006 by Princeton University, all rights reserved; see "
    "WORDNET_LICENCE.txt) and the category list of LVIS (CC BY 4.0)."
)

PRIORS = defaultdict(
    lambda: 0.1,
    {3: 1.0, 4: 0.2, 5: 1.0, 6: 1.0, 8: 1.0, 10: 0.3, 13: 1.0, 14: 0.2, 15: 0.3, 17: 1.0, 18: 1.0,
     19: 0.3, 20: 0.7, 21: 0.2, 25: 0.3, 27: 0.7},
)  # fmt: skip
"""How likely a caption is about a sense, by the number of its lexicographer file: 5 animals, 6
artifacts, 8 bodies, 13 food, 17 natural objects, 18 persons, ... (lexnames(5WN))."""
COLOUR = "color.n.01"
COLOUR_PRIOR = 1.0  # of the senses that are colours; their file, attributes, is rare otherwise
ADJECTIVE_PRIOR = 0.3  # the tagger excludes most adjectives and verbs
VERB_PRIOR = 0.1
UNTAGGED_PERSON_PRIOR = 0.15  # many are metaphors: a gull that is a fool, a cub that is a novice
CAPITAL_FACTOR = 0.2  # of senses written with a capital, as a Brownie that is a Girl Scout
LEAST_SHARE = 0.33  # of a sense, or of all senses that mean the same categories, among all senses
GENERIC_DEPTH = 7  # superordinates nearer to WordNet's root, as "device", say too little
GROUP = "group.n.01"
GENERAL = ("animal.n.01", "food.n.02", "fruit.n.01", "vegetable.n.01")  # but these count
PERSON_FILE = 18


class Synset(NamedTuple):
    """A set of synonyms, by WordNet's file data.noun."""

    file: int  # the number of the lexicographer file
    lemmas: tuple[tuple[str, int], ...]  # as written, with their numbers in the file
    hypernyms: tuple[str, ...]  # offsets
    is_instance: bool  # an individual, as a person with a name


class WordNet:
    """The nouns of WordNet 3.0, and which of them are other words too.

    Args:
        folder: with data.noun, cntlist.rev and the files index.* (Debian: /usr/share/wordnet).

    Raises:
        FileNotFoundError: a file is missing.
    """

    def __init__(self, folder: Path):
        self._above: dict[str, list[str]] = {}
        self.synsets: dict[str, Synset] = {}  # by offset
        for fields in _lines(folder / "data.noun"):
            count = int(fields[3], 16)
            lemmas = tuple((fields[4 + 2 * i], int(fields[5 + 2 * i], 16)) for i in range(count))
            start, pointers = 5 + 2 * count, int(fields[4 + 2 * count])
            pairs = [fields[start + 4 * i : start + 4 * i + 2] for i in range(pointers)]
            up = tuple(offset for symbol, offset in pairs if symbol in ("@", "@i"))
            instance = any(symbol == "@i" for symbol, _ in pairs)
            self.synsets[fields[0]] = Synset(int(fields[1]), lemmas, up, instance)
        self.other_words = {  # by the mark of words of `make_table`
            mark: {fields[0] for pos in kinds for fields in _lines(folder / f"index.{pos}")}
            for mark, kinds in {"*": ["verb"], "+": ["adj", "adv"]}.items()
        }
        # Offsets of the senses of a lemma in lower case, the most frequent one first.
        self.senses = {f[0]: f[-int(f[2]) :] for f in _lines(folder / "index.noun")}
        self.noun_counts: dict[str, int] = {}  # by sense key
        self.other_counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        adverbs: dict[str, int] = defaultdict(int)
        for key, _, count in _lines(folder / "cntlist.rev"):
            lemma, _, rest = key.partition("%")
            adverbs[lemma] += int(count) * (rest.startswith("4") - rest.startswith("1"))
            if rest.startswith("1"):
                self.noun_counts[key] = int(count)
            else:
                self.other_counts[lemma]["verb" if rest[0] == "2" else "adjective"] += int(count)
        # More often an adverb than a noun.
        self.adverbs = {lemma for lemma, excess in adverbs.items() if excess > 0}

    def offset(self, name: str) -> str:
        """The offset of a synset by its name in NLTK's style, as "dog.n.01".

        Raises:
            KeyError: there is no such synset.
        """
        lemma, _, number = name.lower().replace(" ", "_").rsplit(".", 2)
        offsets = self.senses.get(lemma, ())
        if len(offsets) < int(number):
            raise KeyError(f"WordNet has no synset {name!r}")
        return offsets[int(number) - 1]

    def above(self, offset: str) -> list[str]:
        """The offsets of a synset and of all its hypernyms, the nearest first."""
        if offset not in self._above:
            found = self._above[offset] = [offset]
            for one in found:  # grows
                found += [
                    up for up in dict.fromkeys(self.synsets[one].hypernyms) if up not in found
                ]
        return self._above[offset]

    def depth(self, offset: str) -> int:
        """The length of the shortest path to the root."""
        return min((1 + self.depth(up) for up in self.synsets[offset].hypernyms), default=0)

    def shares(self, lemma: str) -> dict[str, float]:
        """How likely each sense of a lemma in lower case is in a caption; with the senses of verbs
        and adjectives the sum is one."""
        weights = {}
        for rank, offset in enumerate(self.senses[lemma], 1):
            synset = self.synsets[offset]
            text, number = next(pair for pair in synset.lemmas if _plain(pair[0]) == lemma)
            tagged = self.noun_counts.get(f"{lemma}%1:{synset.file:02d}:{number:02d}::", 0)
            prior = PRIORS[synset.file]
            if self._colour in self.above(offset):
                prior = COLOUR_PRIOR
            if synset.file == PERSON_FILE and not tagged:
                prior = UNTAGGED_PERSON_PRIOR
            if text[0].isupper():
                prior *= CAPITAL_FACTOR
            weights[offset] = (tagged + 1 / rank) * prior
        others = self.other_counts.get(lemma, {})
        rest = ADJECTIVE_PRIOR * others.get("adjective", 0) + VERB_PRIOR * others.get("verb", 0)
        total = sum(weights.values()) + rest
        return {offset: weight / total for offset, weight in weights.items()}

    def is_noun(self, word: str) -> bool:
        """Whether a word, also in the plural, is a noun, and no more often an adverb."""
        return singular(word) in self.senses and word not in self.adverbs

    def is_collective(self, word: str) -> bool:
        """Whether the most likely sense of a word is a group of things."""
        shares = self.shares(word) if word in self.senses else {}
        return bool(shares) and self.offset(GROUP) in self.above(max(shares, key=shares.get))

    @cached_property
    def _colour(self) -> str:
        return self.offset(COLOUR)


class Meaning(NamedTuple):
    """What categories a sense of a word stands for, as indices of categories."""

    above: tuple[int, ...]  # the sense is a kind of these; the nearest first
    below: tuple[int, ...]  # these are kinds of the sense


def make_table(wordnet: WordNet, lvis: Sequence[dict], sources: dict) -> dict[str, object]:
    """The table of `vlnms_d2.language.synonyms`.

    Args:
        wordnet: the nouns.
        lvis: the categories of LVIS with "name", "synset" and "synonyms", as in Detectron2.
        sources: of `SOURCES`.

    Returns:
        "names", the names of each category, and "words", from the indices of categories to words
        that mean these, both joined by "|". A key "3>1" are categories of which the words are a
        kind; "<4,7" those that are kinds of what the words mean. A word that is also a verb ends
        in "*", one that is an adjective or an adverb in "+". "collective" are those of the words
        that mean a group, as "herd".
    """
    names, synsets, extra = _categories(wordnet, lvis, sources)
    meanings = _meanings(wordnet, synsets)
    words: dict[str, set[Meaning]] = defaultdict(set)
    for lemma in wordnet.senses:
        shares: dict[Meaning, float] = defaultdict(float)
        for offset, share in wordnet.shares(lemma).items():
            if offset in meanings and not _is_proper_person(wordnet.synsets[offset], lemma):
                shares[meanings[offset]] += share
        likely = {meaning for meaning, share in shares.items() if share >= LEAST_SHARE}
        if likely and wordnet.is_noun(words_of(lemma)[-1]):  # else a Latin name, or "stand-in"
            words[" ".join(words_of(lemma))] |= likely
    for word in sources["wrong"]:  # in WordNet; `extra` may say what is right
        words.pop(word, None)
    for category, added in extra.items():
        for word in added:  # people call a teddy bear a bear, which is a category of COCO too
            is_other = word in sources["coco"] and word not in names[category]
            words[word].add(Meaning((), (category,)) if is_other else Meaning((category,), ()))
    groups: dict[str, list[str]] = defaultdict(list)
    for word in sorted(words):
        for meaning in words[word]:
            if not _is_redundant(word, meaning, words):
                marks = [mark for mark, others in wordnet.other_words.items() if word in others]
                groups[_key(meaning)].append(word + "".join(marks))
    return {
        "names": ["|".join(sorted(set(one))) for one in names],
        "words": {key: "|".join(groups[key]) for key in sorted(groups)},
        "collective": "|".join(word for word in sorted(words) if wordnet.is_collective(word)),
    }


def _categories(
    wordnet: WordNet, lvis: Sequence[dict], sources: dict
) -> tuple[list[list[str]], list[list[str]], dict[int, list[str]]]:
    """Of each category its names, the offsets of its synsets, and words that WordNet lacks.

    A category of COCO and one of LVIS with the same synset are one.
    """
    names: list[list[str]] = []
    synsets: list[list[str]] = []
    extra: dict[int, list[str]] = defaultdict(list)
    index_of: dict[str, int] = {}
    for name, of_name in sources["coco"].items():
        offsets = [_offset(wordnet, synset) for synset in of_name]
        index_of.setdefault(offsets[0], len(names))
        names.append([name])
        synsets.append(offsets)
    for category in lvis:
        offset = _offset(wordnet, category["synset"])
        index = index_of.get(offset)
        if index is None:
            index = index_of[offset] = len(names)
            names.append([])
            synsets.append([offset])
        plain = " ".join(words_of(category["name"]))
        names[index].append(" ".join(words_of(category["name"].replace("(", "").replace(")", ""))))
        extra[index] += [
            s for s in (" ".join(words_of(s)) for s in category["synonyms"]) if s != plain
        ]
    by_name = {name: index for index, of_index in enumerate(names) for name in of_index}
    for name, added in sources["words"].items():
        extra[by_name[name]] += added
    return names, synsets, extra


def _meanings(wordnet: WordNet, synsets: Sequence[list[str]]) -> dict[str, Meaning]:
    """The meaning of each synset that is above or below the synset of a category."""
    categories_of: dict[str, list[int]] = defaultdict(list)
    # The first synset is the category itself, the others are kinds of it, as calves of cows.
    pairs = [(rank > 0, i, one) for i, of_i in enumerate(synsets) for rank, one in enumerate(of_i)]
    for _, index, offset in sorted(pairs):
        categories_of[offset].append(index)
    general = {wordnet.offset(name) for name in GENERAL}
    below: dict[str, set[int]] = defaultdict(set)
    for is_extra, index, offset in pairs:
        for up in wordnet.above(offset)[1:] if offset in wordnet.synsets else ():
            # A hot dog is a sausage first; that it is a sandwich too adds nothing to sandwiches.
            if is_extra and up in categories_of:
                continue
            if wordnet.depth(up) >= GENERIC_DEPTH or up in general:
                below[up].add(index)
    meanings = {}
    for offset, synset in wordnet.synsets.items():
        if synset.is_instance:
            continue
        above = [i for up in wordnet.above(offset) for i in categories_of.get(up, ())]
        meaning = Meaning(tuple(dict.fromkeys(above)), tuple(sorted(below[offset] - set(above))))
        if any(meaning):
            meanings[offset] = meaning
    return meanings


def _is_proper_person(synset: Synset, lemma: str) -> bool:
    """Nationalities and names; most are adjectives too."""
    text = next(text for text, _ in synset.lemmas if _plain(text) == lemma)
    return synset.file == PERSON_FILE and text[0].isupper()


def _is_redundant(word: str, meaning: Meaning, words: dict[str, set[Meaning]]) -> bool:
    """Whether the last word of a phrase has the same meaning alone: "bus driver", which says "bus"
    too."""
    parts = word.split()
    return len(parts) > 1 and words.get(singular(parts[-1]), set()) == {meaning}


def _offset(wordnet: WordNet, name: str) -> str:
    """The offset of a synset; its name if WordNet lacks it (stop_sign.n.01)."""
    try:
        return wordnet.offset(name)
    except KeyError:
        return name


def _key(meaning: Meaning) -> str:
    above = ">".join(map(str, meaning.above))
    return above + ("<" + ",".join(map(str, meaning.below)) if meaning.below else "")


def _plain(text: str) -> str:
    return text.split("(")[0].lower()


def _lines(path: Path) -> Iterable[list[str]]:
    """The fields of each line; the licence at the top of a file is indented."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            if not line.startswith("  "):
                yield line.partition(" | ")[0].split()


def write_table(folder: Path, out: Path) -> None:
    """Write the table of COCO's and LVIS's categories.

    Args:
        folder: see `WordNet`.
        out: the file.

    Raises:
        FileNotFoundError: a file of WordNet is missing.
    """
    from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

    sources = json.loads(SOURCES.read_text(encoding="utf-8"))
    # The committed table is told by its licence.
    if not (out.is_file() and json.dumps(LICENCE).encode() in out.read_bytes()):
        refuse_foreign(out)
    table = {"licence": LICENCE} | make_table(WordNet(folder), LVIS_CATEGORIES, sources)
    claim(out)
    with atomic_write(out) as file:
        file.write(json.dumps(table, ensure_ascii=False).encode() + b"\n")
