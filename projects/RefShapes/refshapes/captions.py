"""Captions of RefShapes' images, written in the format of Flickr30k Entities.

The expressions of RefShapes describe one object each; image-text matching and phrase grounding need
sentences that mention several. Each caption lists a few objects of its image, sampled like the
referents of the expressions, by phrases that fit no other object of the image. Each phrase is
marked with its object, whose box is in `Annotations/`. The captions depend only on the scenes and a
seed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from vlnms_d2.data.datasets.refshapes import CATEGORIES, SPLITS
from vlnms_d2.data.entries import read_json, require
from vlnms_d2.file_io import atomic_write, claim, refuse_foreign

from .expressions import HABITS, PLAIN_SHARE
from .phrasing import phrase
from .resolver import SIZE_VISIBLE, Description, resolve
from .scene import Scene, SceneObject
from .writer import image_file_name

CAPTIONS = 5
OBJECTS = (3, 4, 5, 6)
OBJECTS_WEIGHTS = (1, 2, 2, 1)  # 4.5 on average, as in Flickr30k (paper, Sec. 4.3)
PHRASE_TRIES = 4
PHRASE_TYPES: Mapping[str, str] = {
    "bird": "animals",
    "fish": "animals",
    "boat": "vehicles",
    "car": "vehicles",
    "hat": "clothing",
}
"""Types of Flickr30k Entities; all other categories are "other"."""

_SOURCE = "It is written by tools/make_refshapes.py."


class Mention(NamedTuple):
    """An object that a caption mentions, and the phrase for it."""

    object_id: int
    category: str
    text: str


class Caption(NamedTuple):
    """A caption, as the objects that it lists, in order."""

    mentions: tuple[Mention, ...]

    @property
    def text(self) -> str:
        """The sentence, in lower case."""
        return _listed([mention.text for mention in self.mentions])

    def marked(self, chains: Mapping[int, int]) -> str:
        """The sentence with its phrases marked as Flickr30k Entities does.

        Args:
            chains: the number of each object there.
        """
        return _listed(
            [
                f"[/EN#{chains[m.object_id]}/{PHRASE_TYPES.get(m.category, 'other')} {m.text}]"
                for m in self.mentions
            ]
        )


def read_scenes(root: str | Path) -> Iterator[Scene]:
    """Read the scenes in a folder of `tools/make_refshapes.py`, ordered by image id.

    Raises:
        FileNotFoundError: there is no `instances.json`.
        ValueError: it is damaged, or not of RefShapes.
    """
    path = Path(root) / "instances.json"
    content = read_json(path, _SOURCE)
    objects: dict[int, list[SceneObject]] = {}
    for number, annotation in enumerate(require(content, "annotations", list, str(path))):
        where = f"{path}: annotation number {number}"
        image_id = require(annotation, "image_id", int, where)
        objects.setdefault(image_id, []).append(_object(annotation, where))
    images = require(content, "images", list, str(path))
    for image in sorted(images, key=lambda image: image["id"]):
        yield Scene(
            image["id"],
            image["split"],
            image["width"],
            image["height"],
            tuple(objects.get(image["id"], ())),
        )


def captions(scene: Scene, seed: int) -> list[Caption]:
    """`CAPTIONS` captions of a scene; none if no object can be described unambiguously."""
    rng = Random(f"{seed}/{scene.image_id}/captions")
    made = []
    for _ in range(CAPTIONS):
        count = rng.choices(OBJECTS, OBJECTS_WEIGHTS)[0]
        mentions: list[Mention] = []
        # In random order, in which prominent objects tend to come first, as for referents.
        for one in sorted(
            scene.objects, key=lambda o: rng.random() ** (1 / o.prominence), reverse=True
        ):
            if len(mentions) == count:
                break
            text = _phrase(scene, one, rng)
            if text is not None:
                mentions.append(Mention(one.id, one.category, text))
        if mentions:
            made.append(Caption(tuple(mentions)))
    return made


def write_captions(root: str | Path, out_dir: str | Path, seed: int) -> dict[str, int]:
    """Write the captions of a RefShapes folder in the layout of Flickr30k Entities.

    Writes `Annotations/<image id>.xml`, `Sentences/<image id>.txt`, `images/<image id>.jpg`
    (copies) and, last, a list `<split>.txt` for each split; the same folder and seed give
    byte-identical files.

    Args:
        root: a folder of `tools/make_refshapes.py`.
        out_dir: existing or new folder.
        seed: any integer.

    Returns:
        Number of captions by split.
    """
    root, out_dir = Path(root), Path(out_dir)
    listed: dict[str, list[int]] = {split: [] for split in SPLITS}
    counts = dict.fromkeys(SPLITS, 0)
    made = [(scene, captions(scene, seed)) for scene in read_scenes(root)]
    made = [(scene, scene_captions) for scene, scene_captions in made if scene_captions]
    outputs = [out_dir / f"{split}.txt" for split in SPLITS]
    for name in ("Annotations/{}.xml", "Sentences/{}.txt", "images/{}.jpg"):
        outputs += [out_dir / name.format(scene.image_id) for scene, _ in made]
    refuse_foreign(*outputs)
    claim(*outputs)
    for scene, scene_captions in made:
        chains = {one.id: number for number, one in enumerate(scene.objects, 1)}
        _write(out_dir / "Annotations" / f"{scene.image_id}.xml", _xml(scene, chains))
        sentences = "".join(f"{caption.marked(chains)}\n" for caption in scene_captions)
        _write(out_dir / "Sentences" / f"{scene.image_id}.txt", sentences)
        image = root / "images" / image_file_name(scene.image_id)
        shutil.copyfile(image, out_dir / "images" / f"{scene.image_id}.jpg")
        listed[scene.split].append(scene.image_id)
        counts[scene.split] += len(scene_captions)
    for split, ids in listed.items():
        _write(out_dir / f"{split}.txt", "".join(f"{image_id}\n" for image_id in ids))
    return counts


def _phrase(scene: Scene, one: SceneObject, rng: Random) -> str | None:
    """A random phrase that describes only this object of the scene, by its appearance; None if none
    was found."""
    habits = HABITS["refcoco+"]
    for _ in range(PHRASE_TRIES):
        color, pattern, size, _ = (rng.random() < share for share in habits.referent)
        description = Description(
            category=one.category,
            color=one.color if color else None,
            # People rarely call an object plain.
            pattern=one.pattern
            if pattern and (one.pattern != "plain" or rng.random() < PLAIN_SHARE)
            else None,
            size=one.size
            if size and one.size != "medium" and one.visible >= SIZE_VISIBLE
            else None,
        )
        if resolve(scene, description).is_exactly(one.id):
            text = phrase(description, "refcoco+", rng).removeprefix("the ")
            return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"
    return None


def _listed(phrases: Sequence[str]) -> str:
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last


def _object(annotation: dict[str, Any], where: str) -> SceneObject:
    attributes = require(annotation, "attributes", dict, where)
    x, y, width, height = require(annotation, "bbox", list, where)
    return SceneObject(
        id=require(annotation, "id", int, where),
        category=CATEGORIES[require(annotation, "category_id", int, where) - 1],
        color=require(attributes, "color", str, where),
        pattern=require(attributes, "pattern", str, where),
        size=require(attributes, "size", str, where),
        box=(x, y, x + width, y + height),
        visible=attributes["visible"],
        segmentation=tuple(map(tuple, annotation["segmentation"])),
        area=annotation["area"],
    )


def _xml(scene: Scene, chains: Mapping[int, int]) -> str:
    """The boxes of the objects, with 1-based pixels, the last one included."""
    lines = [
        "<annotation>",
        f"<filename>{scene.image_id}.jpg</filename>",
        f"<size><width>{scene.width}</width><height>{scene.height}</height><depth>3</depth></size>",
    ]
    for one in scene.objects:
        x1, y1, x2, y2 = (round(value) for value in one.box)
        lines.append(
            f"<object><name>{chains[one.id]}</name><bndbox><xmin>{x1 + 1}</xmin>"
            f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        )
    return "\n".join([*lines, "</annotation>", ""])


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
