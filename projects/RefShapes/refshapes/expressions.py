"""Referring expressions of RefShapes, written in the format of REFER.

For each image and style a few referents are sampled, each described by one to three sentences. The
result depends only on the seed and the image id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import hypot
from pathlib import Path
from random import Random
from typing import NamedTuple

from vlnms_d2.data.datasets.refshapes import STYLES

from .lexicon import LOCATION_WORDS
from .phrasing import WORDS_ALLOWED, misspell, phrase
from .resolver import (
    CORNERS,
    COVERING,
    DIRECTIONS,
    NEARBY,
    SIDES,
    SIZE_VISIBLE,
    Description,
    Pick,
    Relation,
    context_ids,
    relation_holds,
    resolve,
)
from .scene import Scene, SceneObject
from .writer import Ref, Sentence, write_refer

REFERENTS_PER_STYLE = 3
SENTENCES = (1, 2, 3)
SENTENCES_WEIGHTS = (1, 2, 1)
ATTEMPTS_PER_SENTENCE = 3
MISSPELT_SHARE = 0.03
TRIES_PER_FORM = 10
PLAIN_SHARE = 0.4  # relative to how often other patterns are named


def describe_scene(
    scene: Scene, style: str, seed: int
) -> Iterator[tuple[SceneObject, list[Sentence]]]:
    """Referents of a scene with one to three sentences each, in one style.

    Yields at most `REFERENTS_PER_STYLE` referents, fewer if too few objects can be told apart.
    """
    # A string gives the same sequence in every process, unlike the hash of an object.
    rng = Random(f"{seed}/{scene.image_id}/{style}")
    count = 0
    for referent in _shuffled(scene.objects, rng):
        if count == REFERENTS_PER_STYLE:
            return
        sentences = _sentences(scene, referent, style, rng)
        if sentences:
            count += 1
            yield referent, sentences


def _shuffled(objects: Sequence[SceneObject], rng: Random) -> list[SceneObject]:
    """Objects in random order, in which prominent ones tend to come first."""
    return sorted(objects, key=lambda one: rng.random() ** (1 / one.prominence), reverse=True)


def _sentences(scene: Scene, referent: SceneObject, style: str, rng: Random) -> list[Sentence]:
    count = rng.choices(SENTENCES, SENTENCES_WEIGHTS)[0]
    describer = Describer(scene, referent, style, rng)
    sentences: dict[str, Sentence] = {}
    for _ in range(count * ATTEMPTS_PER_SENTENCE):
        if len(sentences) == count:
            break
        expression = describer.expression()
        if expression is None:
            break
        wrong = misspell(expression.text, rng) if rng.random() < MISSPELT_SHARE else None
        sentence = Sentence(wrong or expression.text, expression.text, expression.context)
        sentences.setdefault(expression.text, sentence)
    return list(sentences.values())


def write_expressions(scenes: Sequence[Scene], out_dir: Path, seed: int) -> dict[str, int]:
    """Write the expressions of all scenes as REFER files, and their contexts.

    Writes `refs(refcoco).p`, `refs(refcoco+).p`, `refs(refcocog).p` and `contexts.json`; the same
    scenes and seed give byte-identical files.

    Args:
        scenes: scenes with distinct image ids, in any order.
        out_dir: existing or new folder.
        seed: any integer.

    Returns:
        Number of sentences by style.

    Raises:
        ValueError: two scenes have the same image id.
    """
    ordered = sorted(scenes, key=lambda scene: scene.image_id)
    for one, other in pairwise(ordered):
        if one.image_id == other.image_id:
            raise ValueError(
                f"Image id {one.image_id} belongs to two scenes: expected distinct ids. Renumber "
                "the scenes."
            )
    refs: dict[str, list[Ref]] = {style: [] for style in STYLES}
    for style in STYLES:
        for scene in ordered:
            for referent, sentences in describe_scene(scene, style, seed):
                refs[style].append(Ref(scene, referent, sentences))
    write_refer(refs, Path(out_dir))
    return {style: sum(len(ref.sentences) for ref in refs[style]) for style in STYLES}


# --- descriptions ------------------------------------------------------------------------------


class Attributes(NamedTuple):
    """How often a description names each property of an object."""

    color: float
    pattern: float
    size: float
    hidden: float


class Habits(NamedTuple):
    """How people describe objects under the rules of one data set.

    Attributes:
        forms: weight with which each form of description is tried first.
        referent, context: how often properties of the referent and of a contextual object are
            named.
        relations: kinds of relation in use.
        trim: how often an unnecessary property is removed.
    """

    forms: Mapping[str, float]
    referent: Attributes
    context: Attributes
    relations: tuple[str, ...]
    trim: float


HABITS = {
    "refcoco": Habits(
        forms={"looks": 30, "side": 32, "extreme": 8, "ordinal": 8, "size": 5, "related": 12},
        referent=Attributes(0.45, 0.15, 0.15, 0.02),
        context=Attributes(0.4, 0.12, 0.08, 0.0),
        relations=(*DIRECTIONS, *NEARBY, *COVERING),
        trim=0.6,
    ),
    "refcoco+": Habits(
        forms={"looks": 72, "size": 10, "related": 18},
        referent=Attributes(0.75, 0.45, 0.3, 0.05),
        context=Attributes(0.5, 0.15, 0.1, 0.0),
        relations=(*NEARBY, "behind"),
        trim=0.4,
    ),
    "refcocog": Habits(
        forms={"related": 60, "two": 20, "between": 8, "side": 6, "extreme": 2, "looks": 4},
        referent=Attributes(0.7, 0.4, 0.35, 0.03),
        context=Attributes(0.65, 0.3, 0.2, 0.0),
        relations=(*DIRECTIONS, *NEARBY, *COVERING),
        trim=0.0,
    ),
}


class Expression(NamedTuple):
    """A sentence, its meaning and the ids of the contextual objects that it names."""

    text: str
    description: Description
    context: tuple[int, ...]


class Describer:
    """Describes one object of a scene in one style."""

    def __init__(self, scene: Scene, referent: SceneObject, style: str, rng: Random) -> None:
        self.scene = scene
        self.referent = referent
        self.style = style
        self.habits = HABITS[style]
        self.rng = rng
        self._neighbours = self._sure_relations()

    def expression(self) -> Expression | None:
        """A random unambiguous expression, or None if none was found."""
        for form in self._forms():
            for _ in range(TRIES_PER_FORM):
                proposal = self._propose(form)
                if proposal is None:
                    break
                expression = self._accept(proposal)
                if expression is not None:
                    return expression
        return None

    def _forms(self) -> list[str]:
        """The forms in random order, in which frequent ones tend to come first."""
        forms = self.habits.forms
        return sorted(forms, key=lambda form: self.rng.random() ** (1 / forms[form]), reverse=True)

    def _accept(self, proposal: Description) -> Expression | None:
        if not resolve(self.scene, proposal).is_exactly(self.referent.id):
            return None
        proposal = self._trimmed(proposal)
        context = context_ids(self.scene, proposal, self.referent)
        if context is None:
            return None
        targets = [target for relation in proposal.relations for target in relation.targets]
        unique = [
            resolve(self.scene, target).is_exactly(object_id)
            for target, object_id in zip(targets, context, strict=True)
        ]
        text = phrase(proposal, self.style, self.rng, unique)
        words = text.split()
        fewest, most = WORDS_ALLOWED[self.style]
        if not fewest <= len(words) <= most:
            return None
        if self.style == "refcoco+" and not LOCATION_WORDS.isdisjoint(words):
            return None
        return Expression(text, proposal, context)

    def _trimmed(self, proposal: Description) -> Description:
        """The description, sometimes without its unnecessary properties."""
        for name in ("size", "pattern", "color"):
            if getattr(proposal, name) is None or self.rng.random() >= self.habits.trim:
                continue
            shorter = replace(proposal, **{name: None})
            if resolve(self.scene, shorter).is_exactly(self.referent.id):
                proposal = shorter
        return proposal

    def _propose(self, form: str) -> Description | None:
        """A description of the given form that is true of the referent, or None."""
        rng = self.rng
        looks = self._looks(self.referent, self.habits.referent)
        if form == "looks":
            return looks
        if form == "side":
            return replace(looks, pick=Pick("side", rng.choice((*SIDES, *CORNERS, "middle"))))
        if form == "extreme":
            return replace(looks, pick=Pick("extreme", rng.choice(SIDES)))
        if form == "ordinal":
            return replace(looks, pick=Pick("ordinal", rng.choice(SIDES), rng.choice((2, 2, 3))))
        if form == "size":
            if self.referent.size == "medium":
                return None
            return replace(looks, size=None, pick=Pick("size", self.referent.size))
        if form == "between":
            relations = self._between()
        else:
            relations = self._relations(2 if form == "two" else 1)
        return replace(looks, relations=relations) if relations else None

    def _looks(self, one: SceneObject, shares: Attributes) -> Description:
        named = [self.rng.random() < share for share in shares]
        # People rarely call an object plain.
        worth_saying = one.pattern != "plain" or self.rng.random() < PLAIN_SHARE
        # The size of a mostly covered object is unknown.
        sized = one.size != "medium" and one.visible >= SIZE_VISIBLE
        return Description(
            category=one.category,
            color=one.color if named[0] else None,
            pattern=one.pattern if named[1] and worth_saying else None,
            size=one.size if named[2] and sized else None,
            hidden=named[3],
        )

    def _sure_relations(self) -> list[tuple[str, SceneObject, float]]:
        """(kind, other object, weight) of all relations of the referent.

        Near and prominent objects have higher weights, as people prefer to name those.
        """
        scene, referent = self.scene, self.referent
        diagonal = hypot(scene.width, scene.height)
        relations = []
        for other in scene.objects:
            if other.id == referent.id:
                continue
            dx = other.center[0] - referent.center[0]
            dy = other.center[1] - referent.center[1]
            weight = other.prominence / (0.1 + hypot(dx, dy) / diagonal)
            for kind in self.habits.relations:
                if relation_holds(scene, kind, referent, [other]).sure:
                    relations.append((kind, other, weight))
        return relations

    def _relations(self, count: int) -> tuple[Relation, ...] | None:
        chosen: dict[int, Relation] = {}
        if len({other.id for _, other, _ in self._neighbours}) < count:
            return None
        weights = [weight for _, _, weight in self._neighbours]
        while len(chosen) < count:
            kind, other, _ = self.rng.choices(self._neighbours, weights)[0]
            if other.id not in chosen:
                target = self._looks(other, self.habits.context)
                chosen[other.id] = Relation(kind, (target,))
        return tuple(chosen.values())

    def _between(self) -> tuple[Relation, ...] | None:
        scene, referent = self.scene, self.referent
        others = [one for one in scene.objects if one.id != referent.id]
        pairs = [
            (one, other)
            for at, one in enumerate(others)
            for other in others[at + 1 :]
            if relation_holds(scene, "between", referent, [one, other]).sure
        ]
        if not pairs:
            return None
        weights = [one.prominence * other.prominence for one, other in pairs]
        pair = self.rng.choices(pairs, weights)[0]
        return (Relation("between", tuple(self._looks(one, self.habits.context) for one in pair)),)
