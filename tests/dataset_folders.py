"""Small folders in the formats of the public data sets, with real (random) images.

Each maker writes what a user downloads, under the names and paths that
`vlnms_d2.data.builtin.register_all` expects below a folder of data sets.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 80, 60
REFER_SPLITS = {
    "refcoco": {
        "unc": ("train", "train", "val", "testA", "testB"),
        "google": ("train", "train", "val", "test", "train"),
    },
    "refcoco+": {"unc": ("train", "train", "val", "testA", "testB")},
    "refcocog": {
        "umd": ("train", "train", "val", "test", "train"),
        "google": ("train", "train", "val", "val", "train"),
    },
}
"""Folder of REFER -> who split it -> split of each of the refs."""

COCO_IDS = (9, 25, 581857, 34, 42)
KARPATHY_COCO_IDS = (*COCO_IDS[:2], 139, 285, 632)
FLICKR_IDS = (1000092795, 36979, 4817564672, 65567, 7030274)
KARPATHY_SPLITS = {
    "flickr30k": ("train", "train", "val", "test", "test"),
    "coco": ("train", "train", "restval", "val", "test"),
}


def write_image(path: Path, seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> None:
    """Writes random pixels as the suffix says."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


# --- REFER -------------------------------------------------------------------------------------


class _Python2Pickler(pickle._Pickler):
    """Writes text as Python 2 wrote its `str`: bytes, which REFER's files are full of."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_str(self, obj: str) -> None:
        data = obj.encode()
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(obj)

    dispatch[str] = save_str


def dump_python2(obj, path: Path) -> None:
    """Pickles an object as Python 2 did with protocol 2."""
    with path.open("wb") as file:
        _Python2Pickler(file, 2).dump(obj)


def coco_file_name(image_id: int, split: str = "train2014") -> str:
    return f"COCO_{split}_{image_id:012d}.jpg"


def make_refer_folder(root: Path) -> None:
    """Writes `refer/*` and `coco/train2014`: five images with a ref each, of two sentences."""
    for number, image_id in enumerate(COCO_IDS):
        write_image(root / "coco" / "train2014" / coco_file_name(image_id), number)
    instances = _instances(COCO_IDS, "train2014")
    for folder, partitions in REFER_SPLITS.items():
        path = root / "refer" / folder
        path.mkdir(parents=True)
        (path / "instances.json").write_text(json.dumps(instances))
        for who, splits in partitions.items():
            dump_python2(_refs(splits), path / f"refs({who}).p")


def make_coco_annotations(root: Path) -> None:
    """Writes `coco/annotations` of the images of `make_refer_folder` (train2014) and of Karpathy's
    in val2014, and these images."""
    folder = root / "coco" / "annotations"
    folder.mkdir(parents=True)
    for split, image_ids in (("train2014", COCO_IDS), ("val2014", KARPATHY_COCO_IDS[2:])):
        instances = _instances(image_ids, split)
        (folder / f"instances_{split}.json").write_text(json.dumps(instances))
        for number, image_id in enumerate(image_ids):
            write_image(root / "coco" / split / coco_file_name(image_id, split), number)


def _instances(image_ids: Sequence[int], split: str) -> dict:
    # Ids of COCO have gaps: 90 is the last of 80 categories.
    categories = {1: "person", 18: "dog", 47: "cup", 90: "toothbrush"}
    first = 0 if split == "train2014" else 1000
    return {
        "images": [
            {"id": image_id, "file_name": coco_file_name(image_id, split), "height": HEIGHT,
             "width": WIDTH, "license": 1, "coco_url": "", "date_captured": ""}
            for image_id in image_ids
        ],
        "annotations": [
            annotation
            for number, image_id in enumerate(image_ids)
            for annotation in _coco_annotations(
                first + 10 * number, image_id, sorted(categories)
            )
        ],
        "categories": [
            {"id": i, "name": name, "supercategory": "thing"} for i, name in categories.items()
        ],
    }  # fmt: skip


def _coco_annotations(first: int, image_id: int, category_ids: Sequence[int]) -> list[dict]:
    boxes = {
        "left": [0, 0, 30.5, 40.25],  # touches the border
        "right": [45, 20, 60, 25],  # sticks out of it
        "crowd": [10, 30, 40, 20],
    }
    return [
        {"id": first + number, "image_id": image_id, "bbox": box, "area": box[2] * box[3],
         "category_id": category_ids[(first // 10 + number) % len(category_ids)],
         "iscrowd": int(name == "crowd"), "segmentation": _segmentation(name, box)}
        for number, (name, box) in enumerate(boxes.items(), 1)
    ]  # fmt: skip


def _segmentation(name: str, box: Sequence[float]):
    if name == "crowd":
        return {"size": [HEIGHT, WIDTH], "counts": [0, 600, HEIGHT * WIDTH - 600]}
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def _refs(splits: Sequence[str]) -> list[dict]:
    return [
        {
            "ref_id": 100 + number,
            "ann_id": 10 * number + 1,
            "category_id": [1, 18, 47, 90][number % 4],
            "image_id": image_id,
            "file_name": coco_file_name(image_id).replace(".jpg", f"_{10 * number + 1}.jpg"),
            "split": split,
            "sent_ids": [2 * number, 2 * number + 1],
            "sentences": [
                {"sent_id": 2 * number, "sent": "the red cup", "raw": "The RED cup!",
                 "tokens": ["the", "red", "cup"]},
                {"sent_id": 2 * number + 1, "sent": "dog à gauche", "raw": "dog à gauche",
                 "tokens": ["dog", "à", "gauche"]},
            ],
        }
        for number, (image_id, split) in enumerate(zip(COCO_IDS, splits, strict=True))
    ]  # fmt: skip


# --- Flickr30k Entities ------------------------------------------------------------------------

SENTENCES = (
    "[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] , [/EN#0/notvisual who]"
    " look at [/EN#2/bodyparts their hands] in [/EN#3/scene the yard] .",
    "[/EN#4/vehicles/other A red “café” van] near [/EN#1/people the men ] .",
    "[/EN#5/other Un chapeau bleu] .",  # a chain that the annotations lack
    "Nothing to see here .",
    "[/EN#1/people Two men] in [/EN#6/clothing a [ green ) shirt] .",
)
"""What one image's file holds; 7 of the phrases have a box, chains 1 and 2 have two."""

OBJECTS = (
    (("1",), (1, 1, 30, 60)),  # touches the border: pixels are counted from 1
    (("1", "2"), (41, 11, 70, 50)),
    (("2",), (5, 5, 20, 20)),
    (("3",), None),
    (("4",), (60, 40, 95, 75)),  # sticks out of it
    (("6",), (10, 20, 30, 40)),
)
"""Chains and box (xmin, ymin, xmax, ymax) of each object; None for a scene."""


def write_sentences(path: Path, sentences: Sequence[str] = SENTENCES, end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(sentence + end for sentence in sentences).encode())


def write_boxes(path: Path, objects=OBJECTS, width: int = WIDTH, height: int = HEIGHT) -> None:
    lines = [
        "<annotation>",
        f"\t<filename>{path.stem}.jpg</filename>",
        f"\t<size>\n\t\t<width>{width}</width>\n\t\t<height>{height}</height>",
        "\t\t<depth>3</depth>\n\t</size>",
        "\t<segmented>0</segmented>",
    ]
    for chains, box in objects:
        lines.append("\t<object>")
        lines += [f"\t\t<name>{chain}</name>" for chain in chains]
        if box is None:
            lines += ["\t\t<scene>1</scene>", "\t\t<nobndbox>1</nobndbox>"]
        else:
            corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
            inner = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners)
            lines.append(f"\t\t<bndbox>{inner}</bndbox>")
        lines.append("\t</object>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "</annotation>", ""]))


def make_flickr30k_entities_folder(root: Path) -> None:
    """Writes `flickr30k_entities` (train: 3 images, one of them without any box; val and test: one
    each) and `flickr30k/flickr30k-images`."""
    folder = root / "flickr30k_entities"
    for number, image_id in enumerate(FLICKR_IDS):
        objects = [(("1",), None)] if number == 2 else OBJECTS
        write_boxes(folder / "Annotations" / f"{image_id}.xml", objects)
        write_sentences(folder / "Sentences" / f"{image_id}.txt")
        write_image(root / "flickr30k" / "flickr30k-images" / f"{image_id}.jpg", number)
    train, val, test = FLICKR_IDS[:3], FLICKR_IDS[3:4], FLICKR_IDS[4:]
    for split, image_ids in (("train", train), ("val", val), ("test", test)):
        (folder / f"{split}.txt").write_text("".join(f"{one}\n" for one in image_ids))


# --- Karpathy ----------------------------------------------------------------------------------


def make_karpathy_folder(root: Path, which: str) -> None:
    """Writes `karpathy/dataset_{which}.json` and its five images, two sentences each.

    Args:
        which: "flickr30k" or "coco".
    """
    images = []
    for number, split in enumerate(KARPATHY_SPLITS[which]):
        sent_ids = [2 * number, 2 * number + 1]
        entry = {
            "imgid": number,
            "sentids": sent_ids,
            "split": split,
            "sentences": [
                sentence(sent_ids[0], number, "A red cup, left of  the\ndog . "),
                sentence(sent_ids[1], number, "Ein blauer Hut für zwei."),
            ],
            **_place(which, number, split),
        }
        images.append(entry)
        folder = root / "flickr30k" / "flickr30k-images"
        if which == "coco":
            folder = root / "coco" / entry["filepath"]
        write_image(folder / entry["filename"], number)
    write_karpathy(root / "karpathy" / f"dataset_{which}.json", images, which)


def _place(which: str, number: int, split: str) -> Mapping[str, object]:
    if which == "flickr30k":
        return {"filename": f"{FLICKR_IDS[number]}.jpg"}
    filepath = "train2014" if split == "train" else "val2014"
    image_id = KARPATHY_COCO_IDS[number]
    name = coco_file_name(image_id, filepath)
    return {"filename": name, "filepath": filepath, "cocoid": image_id}


def sentence(sentid: int, imgid: int, raw: str) -> dict:
    tokens = "".join(c if c.isalnum() else " " for c in raw.lower()).split()
    return {"raw": raw, "tokens": tokens, "sentid": sentid, "imgid": imgid}


def write_karpathy(path: Path, images: Sequence[Mapping], which: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": list(images), "dataset": which}))
