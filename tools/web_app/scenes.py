"""What is computed once per image: candidates of a model, or detections of a file."""

from __future__ import annotations

import base64
import hashlib
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import Tensor

from reranking.annotations import read_categories
from reranking.detections import DetectionStore, check_not_corners
from vlnms_d2 import VLNMSPredictor, rerank
from vlnms_d2.data.mapper import read_image
from vlnms_d2.export.model import detector_classes
from vlnms_d2.file_io import write_json
from vlnms_d2.modeling.branch import refine_boxes
from vlnms_d2.modeling.candidates import Candidates
from vlnms_d2.modeling.feature_extraction import check_model, extract_features
from vlnms_d2.modeling.relatedness import box_locations

MAX_SIDE = 1600  # pixels of the picture that the page shows
REMEMBERED = 16  # images whose candidates stay in memory
WITHOUT_WEIGHTS = ("Category", "Portable")
"""Relatedness modules that work for boxes from anywhere."""


@dataclass
class Scene:
    """An image and its N boxes, before any query.

    Attributes:
        image: uint8 [H, W, 3], BGR.
        data_uri: the image as a JPEG for the page.
        boxes: float32 [N, 4], xyxy in pixels of `image`.
        scores: float32 [N], class confidence c.
        classes: int64 [N].
        class_names, category_ids: by class.
        image_id: of the detections file; 0 for a model.
        seconds: that the detector took; 0 if the boxes come from a file.
        candidates, image_size: of the model, in pixels of its input; None if from a file.
        visual: features of the boxes, by relatedness module.
    """

    image: np.ndarray
    data_uri: str
    boxes: Tensor
    scores: Tensor
    classes: Tensor
    class_names: Sequence[str]
    category_ids: Sequence[int]
    image_id: int = 0
    seconds: float = 0.0
    candidates: Candidates | None = None
    image_size: tuple[int, int] | None = None
    visual: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def photo_id(self) -> str:
        """The id of the picture on the page, the same for the same picture."""
        return "photo-" + hashlib.sha256(self.data_uri.encode()).hexdigest()[:16]


class Scenes:
    """The latest images, each computed once, whoever asks.

    Args:
        capacity: how many are kept.
    """

    def __init__(self, capacity: int = REMEMBERED):
        self._capacity = capacity
        self._scenes: OrderedDict[str, Scene] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str, compute: Callable[[], Scene]) -> Scene:
        """The scene of a key. One is computed at a time, so that none is computed twice."""
        with self._lock:
            if key not in self._scenes:
                self._scenes[key] = compute()
            self._scenes.move_to_end(key)
            while len(self._scenes) > self._capacity:
                self._scenes.popitem(last=False)
            return self._scenes[key]


class Models:
    """Models that share a detector, by the name of their relatedness module.

    Args:
        cfgs: their configs, with weights.

    Raises:
        ValueError: a model accepts no queries, or the detectors differ.
    """

    def __init__(self, cfgs: Sequence[CfgNode]):
        self._predictors = {}
        for cfg in cfgs:
            name, predictor = cfg.MODEL.VLNMS.RELATEDNESS, VLNMSPredictor(cfg)
            check_model(predictor.model, cfg.MODEL.WEIGHTS)
            self._predictors[name] = predictor
        self.first = next(iter(self._predictors.values()))
        shared = _detector_weights(self.first)
        for name, predictor in self._predictors.items():
            for key, value in _detector_weights(predictor).items():
                if key not in shared or not torch.equal(value, shared[key]):
                    raise ValueError(f"the detector of {name} differs from the first one in {key}")
        cfg = self.first.cfg
        self.category_ids, self.class_names = range(cfg.MODEL.ROI_HEADS.NUM_CLASSES), []
        if cfg.DATASETS.TEST:
            self.category_ids, self.class_names = detector_classes(cfg, cfg.DATASETS.TEST[0])
        self._scenes = Scenes()

    @property
    def names(self) -> list[str]:
        """What `score` accepts."""
        extra = WITHOUT_WEIGHTS if self.class_names else ()
        return list(dict.fromkeys([*self._predictors, *extra]))

    def scene(self, path: str | Path) -> Scene:
        """Run the detector on an image file, unless it has been.

        Raises:
            ValueError: it is no image that can be read.
        """
        return self._scenes.get(_digest(path), lambda: self._compute(_read_picture(path)))

    def _compute(self, image: np.ndarray) -> Scene:
        start = time.perf_counter()
        features = extract_features(self.first.model, self.first.prepare(image))
        seconds = time.perf_counter() - start
        candidates = features.candidates
        (height, width), (out_height, out_width) = features.image_size, features.output_size
        scale = candidates.boxes.new_tensor([out_width / width, out_height / height] * 2)
        return Scene(
            image,
            data_uri(image),
            candidates.boxes * scale,
            candidates.scores,
            candidates.classes,
            self.class_names,
            self.category_ids,
            seconds=seconds,
            candidates=candidates,
            image_size=features.image_size,
        )

    @torch.no_grad()
    def score(
        self, scene: Scene, queries: Sequence[str], relatedness: str
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Relatedness of all boxes to the queries.

        Returns:
            r, float [Q, N]; the boxes, float [N, 4] or, if each query refines them, [Q, N, 4]; and
            word attention, float [Q, L] or [Q, N, L], or None.
        """
        if relatedness not in self._predictors:
            return portable_relatedness(scene, queries, relatedness), scene.boxes, None
        head = self._predictors[relatedness].model.roi_heads
        if relatedness not in scene.visual:
            [scene.visual[relatedness]] = head.encode_candidates([scene.candidates])
        [text] = head.vlnms.encode_queries([list(queries)])
        locations = box_locations(scene.candidates.boxes, scene.image_size)
        related, output = head.vlnms.score(scene.visual[relatedness], locations, text, True)
        boxes = scene.boxes
        if output.deltas is not None:
            height, width = scene.image.shape[:2]
            box2box = head.last_predictor.box2box_transform
            boxes = refine_boxes(boxes, output.deltas, (height, width), box2box)
        return related, boxes, output.attention

    def words(self, query: str, relatedness: str) -> list[str]:
        """The words of a query that the module reads."""
        if relatedness in self._predictors:
            encoder = self._predictors[relatedness].model.roi_heads.vlnms.text_encoder
            return list(encoder.tokenize(query))
        return query.split()


class DetectionFiles:
    """Scenes of a picture and a detections file, without a model."""

    names = WITHOUT_WEIGHTS

    def __init__(self):
        self._scenes = Scenes()

    def scene(
        self, path: str | Path, detections: str | Path, categories: str | Path | None
    ) -> Scene:
        """The detections of a file on a picture.

        Args:
            path: of the picture.
            detections: COCO results of this picture; of several pictures, that of the id in the
                picture's name (000000000042.jpg is 42).
            categories: file in COCO's format with "categories"; None for COCO's 80.

        Raises:
            OSError, ValueError: a file is damaged, or has no detections of the picture.
        """
        key = " ".join(map(_digest, filter(None, (path, detections, categories))))
        key += Path(path).stem
        return self._scenes.get(key, lambda: self._read(Path(path), detections, categories))

    def _read(self, path: Path, detections: str | Path, categories: str | Path | None) -> Scene:
        image = _read_picture(path)
        with tempfile.TemporaryDirectory() as folder:
            if categories is None:
                categories = Path(folder, "coco_categories.json")
                write_json(categories, {"categories": _coco_categories()})
            names = read_categories(Path(categories))
            class_of = {category_id: i for i, category_id in enumerate(names)}
            store = DetectionStore.build(Path(detections), class_of, Path(categories), Path(folder))
            ids = store.image_ids.tolist()
            digits = "".join(c for c in path.stem if c.isdigit())
            named = int(digits[-18:]) if digits else None
            if len(ids) > 1 and named not in ids:
                raise ValueError(
                    f"{Path(detections).name}: has detections of {len(ids)} images, of which none "
                    f"has the number in the picture's name, {path.name}. Rename the picture to the "
                    f"image_id, as {ids[0]}.jpg."
                )
            if not ids:
                raise ValueError(f"{Path(detections).name}: has no detections.")
            image_id = ids[0] if len(ids) == 1 else named
            found = store.of(image_id)
        check_not_corners(Path(Path(detections).name), [(found.boxes, image.shape[:2])])
        boxes = torch.from_numpy(found.corners).float()
        scores = torch.from_numpy(found.scores).float()
        classes = torch.from_numpy(np.ascontiguousarray(found.classes))
        names, ids = list(names.values()), list(names)
        return Scene(image, data_uri(image), boxes, scores, classes, names, ids, image_id)

    def score(
        self, scene: Scene, queries: Sequence[str], relatedness: str
    ) -> tuple[Tensor, Tensor, None]:
        """As `Models.score`."""
        return portable_relatedness(scene, queries, relatedness), scene.boxes, None

    def words(self, query: str, relatedness: str) -> list[str]:
        """As `Models.words`."""
        return query.split()


def portable_relatedness(scene: Scene, queries: Sequence[str], relatedness: str) -> Tensor:
    """r of a module that needs no weights of the detector, float [Q, N]."""
    related = torch.zeros(len(queries), len(scene.boxes))
    # Every box is kept: no IoU is above 1.
    results = rerank(
        scene.boxes,
        scene.scores,
        scene.classes,
        scene.class_names,
        queries,
        topk=-1,
        nms_thresh=1.0,
        relatedness=relatedness,
        image=scene.image,
    )
    for row, result in zip(related, results, strict=True):
        row[result.candidate_index] = result.relatedness
    return related


def _read_picture(path: str | Path) -> np.ndarray:
    try:
        return read_image(path, "BGR")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{Path(path).name} cannot be read as a picture, expected a complete JPEG, PNG or "
            "another common format."
        ) from error


def data_uri(image: np.ndarray) -> str:
    """A BGR image as a JPEG for the page, in a `data:` address."""
    scale = min(1.0, MAX_SIDE / max(image.shape[:2]))
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()


def _detector_weights(predictor: VLNMSPredictor) -> dict[str, Tensor]:
    state = predictor.model.state_dict()
    return {key: value for key, value in state.items() if ".vlnms." not in key}


def _digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _coco_categories() -> list[dict[str, object]]:
    metadata = MetadataCatalog.get("coco_2017_val")
    ids = metadata.thing_dataset_id_to_contiguous_id
    return [{"id": number, "name": metadata.thing_classes[i]} for number, i in ids.items()]
