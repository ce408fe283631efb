"""Referring expressions of RefShapes: who is referred to, in which words, written as REFER.

For each image and style a few referents are drawn, each described by one to three sentences.
Everything follows from the seed and the image id alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

from vlnms_d2.data.datasets.refshapes import STYLES

from .describing import Describer, Expression
from .phrasing import misspell
from .refer_writer import Ref, Sentence, write_refer
from .scene import Scene, SceneObject

REFERENTS_PER_MANNER = 3
SENTENCES = (1, 2, 3)
SENTENCES_WEIGHTS = (1, 2, 1)
ATTEMPTS_PER_SENTENCE = 3
MISSPELT_SHARE = 0.03


@dataclass(frozen=True)
class Said:
    """One sentence about a referent.

    Attributes:
        expression: the sentence as meant, its meaning and its context.
        written: the sentence as written: with a misspelling now and then.
    """

    expression: Expression
    written: str


def describe_scene(scene: Scene, style: str, seed: int) -> Iterator[tuple[SceneObject, list[Said]]]:
    """Referents of a scene with one to three sentences each, in one style.

    Yields at most `REFERENTS_PER_MANNER` referents, fewer if too few objects can be told apart.
    """
    # A string seeds the same sequence in every process, which a hash of objects would not.
    rng = Random(f"{seed}/{scene.image_id}/{style}")
    found = 0
    for referent in _shuffled(scene.objects, rng):
        if found == REFERENTS_PER_MANNER:
            return
        said = _sentences(scene, referent, style, rng)
        if said:
            found += 1
            yield referent, said


def _shuffled(objects: Sequence[SceneObject], rng: Random) -> list[SceneObject]:
    """Objects in random order, those that catch the eye tending to come first."""
    return sorted(objects, key=lambda one: rng.random() ** (1 / one.prominence), reverse=True)


def _sentences(scene: Scene, referent: SceneObject, style: str, rng: Random) -> list[Said]:
    count = rng.choices(SENTENCES, SENTENCES_WEIGHTS)[0]
    describer = Describer(scene, referent, style, rng)
    said: dict[str, Said] = {}
    for _ in range(count * ATTEMPTS_PER_SENTENCE):
        if len(said) == count:
            break
        expression = describer.expression()
        if expression is None:
            break
        wrong = misspell(expression.text, rng) if rng.random() < MISSPELT_SHARE else None
        said.setdefault(expression.text, Said(expression, wrong or expression.text))
    return list(said.values())


def write_expressions(scenes: Sequence[Scene], out_dir: Path, seed: int) -> dict[str, int]:
    """Writes the expressions of all scenes as REFER files, with their contexts beside them.

    Writes `refs(refcoco).p`, `refs(refcoco+).p`, `refs(refcocog).p` and `contexts.json`; the same
    scenes and seed give the same bytes.

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
                f"Image id {one.image_id} belongs to two scenes: expected distinct ids. Number "
                "the scenes anew."
            )
    refs: dict[str, list[Ref]] = {style: [] for style in STYLES}
    for style in STYLES:
        for scene in ordered:
            for referent, said in describe_scene(scene, style, seed):
                sentences = [
                    Sentence(one.written, one.expression.text, one.expression.context)
                    for one in said
                ]
                refs[style].append(Ref(scene, referent, sentences))
    write_refer(refs, Path(out_dir))
    return {style: sum(len(ref.sentences) for ref in refs[style]) for style in STYLES}
