"""RefShapes on disk: images, COCO annotations, REFER expressions and a manifest of the settings."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
from tqdm import tqdm

from vlnms_d2.data.datasets.refshapes import CATEGORIES, SPLITS
from vlnms_d2.file_io import atomic_write, claim, refuse_foreign, write_json

from .painter import make_scene
from .scene import Scene, SceneObject

VERSION = 1
"""Incremented whenever the same settings give different files."""
MANIFEST_NAME = "refshapes.json"
CONTEXTS_FILE_NAME = "contexts.json"
CONTEXTS_VERSION = 1
PICKLE_PROTOCOL = 2  # as in the files that REFER distributes
_JPEG_QUALITY = 90
_IMAGE_NAME = re.compile(r"refshapes_\d+\.jpg")
_ANNOTATIONS_NAME = re.compile(rf"instances_({'|'.join(SPLITS)})\.json")
_REFS = tuple(f"refs({style}).p" for style in ("refcoco", "refcoco+", "refcocog"))
_OUTPUTS = ("images", "annotations", "instances.json", CONTEXTS_FILE_NAME, *_REFS, MANIFEST_NAME)


@dataclass(frozen=True)
class Settings:
    """The settings that determine a data set.

    Attributes:
        seed: non-negative integer.
        width, height: image size in pixels.
        counts: number of images of each entry of `SPLITS`, in that order.
    """

    seed: int
    width: int
    height: int
    counts: tuple[int, ...]

    def manifest(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "seed": self.seed,
            "width": self.width,
            "height": self.height,
            "counts": dict(zip(SPLITS, self.counts, strict=True)),
        }


def image_file_name(image_id: int) -> str:
    """Name, within `images`, of an image."""
    return f"refshapes_{image_id:06d}.jpg"


def is_finished(out_dir: Path, settings: Settings) -> bool:
    """Whether the folder holds the finished data set of these settings."""
    manifest = out_dir / MANIFEST_NAME
    if not manifest.is_file():
        return False
    try:
        return json.loads(manifest.read_text(encoding="utf-8")) == settings.manifest()
    except json.JSONDecodeError:
        return False


def prepare_folder(out_dir: Path, overwrite: bool) -> None:
    """Create the folder; an existing data set in it is removed, or an error without `overwrite`.

    Raises:
        FileExistsError: the folder is not empty and `overwrite` is false, or it has files of
            others where the data set goes.
        NotADirectoryError: the path is a file.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise NotADirectoryError(f"{out_dir} is a file, expected a folder or a new path.")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{out_dir} is not empty and does not hold this data set finished: name another "
            "folder, or pass --overwrite to replace it."
        )
    manifest = out_dir / MANIFEST_NAME
    foreign = [
        path
        for folder, ours in (("images", _IMAGE_NAME), ("annotations", _ANNOTATIONS_NAME))
        for path in sorted((out_dir / folder).rglob("*"))
        if not ours.fullmatch(path.name)
    ]
    if foreign:
        raise FileExistsError(
            f"{foreign[0]}: this tool did not write it, and would remove it. Move it away, or name "
            "another folder."
        )
    try:
        if not manifest.is_file() or '"counts"' not in manifest.read_text("utf-8", "replace"):
            refuse_foreign(*(out_dir / name for name in _OUTPUTS))
    except ValueError as error:
        raise FileExistsError(str(error)) from error
    claim(*(out_dir / name for name in _OUTPUTS))
    for name in _OUTPUTS:
        path = out_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_images(out_dir: Path, settings: Settings, workers: int) -> list[Scene]:
    """Draw every scene and write its image, with a progress bar.

    Returns:
        The scenes by image id, annotation ids counting from 1 through all of them. They do not
        depend on the number of workers.
    """
    images = out_dir / "images"
    images.mkdir(exist_ok=True)
    jobs = [(split, i) for split, n in zip(SPLITS, settings.counts, strict=True) for i in range(n)]
    draw = partial(_draw_one, images, settings)
    scenes: list[Scene] = []
    next_id = 1
    with _mapper(workers) as mapper:
        drawn = mapper(draw, list(enumerate(jobs, 1)))
        for scene in tqdm(drawn, total=len(jobs), unit="image", desc="RefShapes"):
            objects = tuple(replace(o, id=next_id + i) for i, o in enumerate(scene.objects))
            next_id += len(objects)
            scenes.append(replace(scene, objects=objects))
    return scenes


def write_annotations(out_dir: Path, scenes: Sequence[Scene]) -> None:
    """Write `instances.json` of all scenes and `annotations/instances_<split>.json` of each
    split that has any."""
    write_json(out_dir / "instances.json", coco_dict(scenes))
    folder = out_dir / "annotations"
    folder.mkdir(exist_ok=True)
    for split in SPLITS:
        part = [scene for scene in scenes if scene.split == split]
        if part:
            write_json(folder / f"instances_{split}.json", coco_dict(part))


def write_manifest(out_dir: Path, settings: Settings) -> None:
    """Mark the folder as finished; called after everything else is written."""
    write_json(out_dir / MANIFEST_NAME, settings.manifest())


def coco_dict(scenes: Sequence[Scene]) -> dict[str, Any]:
    """Scenes in the COCO format, boxes as (x, y, width, height) in pixels; images also have
    "split", annotations "attributes" (color, pattern, size, visible)."""
    images, annotations = [], []
    for scene in scenes:
        images.append(
            {
                "id": scene.image_id,
                "file_name": image_file_name(scene.image_id),
                "width": scene.width,
                "height": scene.height,
                "split": scene.split,
            }
        )
        for o in scene.objects:
            x1, y1, x2, y2 = o.box
            annotations.append(
                {
                    "id": o.id,
                    "image_id": scene.image_id,
                    "category_id": CATEGORIES.index(o.category) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "segmentation": [list(polygon) for polygon in o.segmentation],
                    "area": o.area,
                    "iscrowd": 0,
                    "attributes": {
                        "color": o.color,
                        "pattern": o.pattern,
                        "size": o.size,
                        "visible": o.visible,
                    },
                }
            )
    categories = [
        {"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(CATEGORIES, 1)
    ]
    return {
        "info": {"description": "RefShapes", "version": str(VERSION)},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


@contextmanager
def _mapper(workers: int) -> Iterator[Any]:
    """Yields an ordered, lazy `map` over a pool, or the plain one for a single worker."""
    if workers == 1:
        yield map
        return
    # A fork of this process would deadlock, if OpenCV has started threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cv2", __name__])
    with context.Pool(workers, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield partial(pool.imap, chunksize=4)


def _draw_one(images: Path, settings: Settings, job: tuple[int, tuple[str, int]]) -> Scene:
    """Draw one image and write it to the folder; its objects are numbered from 1."""
    image_id, (split, index) = job
    image, scene = make_scene(
        settings.seed, split, index, image_id, settings.width, settings.height
    )
    _, packed = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    with atomic_write(images / image_file_name(image_id)) as file:
        file.write(packed.tobytes())
    return scene


# --- expressions -------------------------------------------------------------------------------


class Sentence(NamedTuple):
    """A sentence as written, as meant (without misspelling), and the ids of the contextual objects
    that it names."""

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


def write_refer(refs: Mapping[str, Sequence[Ref]], out_dir: Path) -> None:
    """Write one REFER file per style and `contexts.json`, each atomically.

    `contexts.json` holds "contexts" (sentence id, as text, to annotation ids) and "misspelt"
    (sentence id to the sentence as it was meant). Ref ids and sentence ids are unique over all
    styles, so that one file of contexts suffices.
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
    # A pickle stores a repeated string by reference, if it is the same object. With interned
    # strings the bytes depend only on the content of the strings.
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
