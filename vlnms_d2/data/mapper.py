"""Maps a dataset dict with expressions to a model input with queries and their targets."""

from __future__ import annotations

from pathlib import Path

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import detection_utils
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager
from PIL import Image


class GroundingMapper:
    """Reads the image and turns its expressions into queries.

    A model input has, besides Detectron2's `image`, `height`, `width`:

    * `query`: the expressions' texts;
    * `expressions`: for each query `sent_id`, `manner`, `referent_box` [x1, y1, x2, y2], None if
      there is no referent, and `context_boxes`, a list of such boxes or None if they are not
      annotated; in pixels of the image file;
    * `query_targets` (training): for each query an `Instances` with `gt_boxes`, its foreground, in
      pixels of the network's input, and `gt_classes`, int64, -1 if unknown: the referent, the
      contextual objects, and a detector's boxes (pseudo ground truth), for which `gt_reliable`
      (bool) is False. An expression without a referent, such as a caption, has the others as
      foreground;
    * `instances` (training the detector too): as from Detectron2's `DatasetMapper`.

    Expressions contain "left" and "right", so images are resized but never flipped.

    Args:
        is_train: give `query_targets`, and sample at most `max_queries` expressions per image.
        augmentations: of the image; resizing only.
        image_format: see `detection_utils.read_image`.
        max_queries: most expressions of an image in training.
        with_context: contextual objects are foreground as well; otherwise the referent alone if
            there is one.
        instances: (training) give `instances`: "boxes", or with masks "polygon" or "bitmask".
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: list[T.Augmentation],
        image_format: str,
        max_queries: int,
        with_context: bool = True,
        instances: str | None = None,
    ):
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.max_queries = max_queries
        self.with_context = with_context
        self.instances = instances

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        size = (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN)
        if not is_train:
            size = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        sampling = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING if is_train else "choice"
        instances = cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else "boxes"
        return {
            "is_train": is_train,
            "augmentations": [T.ResizeShortestEdge(*size, sampling)],
            "image_format": cfg.INPUT.FORMAT,
            "max_queries": cfg.MODEL.VLNMS.MAX_QUERIES_PER_IMAGE,
            "with_context": cfg.MODEL.VLNMS.PSEUDO_GT.CONTEXT,
            "instances": None if cfg.MODEL.VLNMS.FREEZE_DETECTOR else instances,
        }

    def __call__(self, dataset_dict: dict) -> dict:
        """Map one image; samples from NumPy's global generator in training only.

        Raises:
            ValueError: the image cannot be decoded or resized, or differs in size from its
                annotation; or (training) an expression has no annotated object.
            KeyError: an annotation that an expression refers to is missing.
        """
        # A shallow copy suffices: nothing below changes its values.
        dataset_dict = dict(dataset_dict)
        image = read_image(dataset_dict["file_name"], self.image_format)
        detection_utils.check_image_size(dataset_dict, image)
        image, transform = resize(self.augmentations, image, dataset_dict["file_name"])

        annotations = {a["id"]: a for a in dataset_dict.pop("annotations")}
        expressions = dataset_dict.pop("expressions")
        if self.is_train and len(expressions) > self.max_queries:
            sampled = np.random.permutation(len(expressions))[: self.max_queries]
            expressions = [expressions[i] for i in sorted(sampled)]
        described = [self._describe(e, annotations, dataset_dict) for e in expressions]

        chw = np.ascontiguousarray(image.transpose(2, 0, 1))
        dataset_dict["image"] = torch.as_tensor(chw)
        dataset_dict["query"] = [e["query"] for e in expressions]
        dataset_dict["expressions"] = described
        if self.is_train:
            size, name = image.shape[:2], dataset_dict["file_name"]
            dataset_dict["query_targets"] = [
                self._target(e, annotations, transform, size, name) for e in expressions
            ]
            if self.instances is not None:
                dataset_dict["instances"] = self._instances(annotations, transform, size, name)
        return dataset_dict

    def _instances(self, annotations, transform, image_size, file_name) -> Instances:
        """What Detectron2's mapper makes of the objects, with errors that name the file."""
        keys = {"bbox", "bbox_mode", "category_id"}
        if self.instances != "boxes":
            keys.add("segmentation")
        objects = [a for a in annotations.values() if not a.get("iscrowd")]
        objects = [{key: a[key] for key in keys & a.keys()} for a in objects]
        if any(o.keys() != keys or o["category_id"] < 0 for o in objects):
            raise ValueError(
                f"{file_name} has objects without a class or mask for the detector to learn: set "
                "MODEL.VLNMS.FREEZE_DETECTOR to True, or for want of masks MODEL.MASK_ON to False"
            )
        for annotation in objects:
            detection_utils.transform_instance_annotations(annotation, transform, image_size)
        objects = detection_utils.annotations_to_instances(objects, image_size, self.instances)
        return detection_utils.filter_empty_instances(objects)

    @staticmethod
    def _describe(expression: dict, annotations: dict[int, dict], dataset_dict: dict) -> dict:
        def box(ann_id: int) -> list[float]:
            if ann_id not in annotations:
                raise KeyError(
                    f"expression {expression['sent_id']} of {dataset_dict['file_name']} refers to "
                    f"annotation {ann_id}, which the image does not have"
                )
            return _xyxy(annotations[ann_id])

        referent, context = expression["ann_id"], expression["context_ann_ids"]
        return {
            "sent_id": expression["sent_id"],
            "manner": expression["manner"],
            "referent_box": None if referent is None else box(referent),
            "context_boxes": None if context is None else [box(i) for i in context],
        }

    def _target(
        self,
        expression: dict,
        annotations: dict[int, dict],
        transform: T.Transform,
        image_size: tuple[int, int],
        file_name: str,
    ) -> Instances:
        referent, context = expression["ann_id"], expression["context_ann_ids"]
        pseudo = expression.get("pseudo_boxes")
        if referent is None and context is None and pseudo is None:
            # Without this check every candidate would be trained as background.
            raise ValueError(
                f"expression {expression['sent_id']} of {file_name} has neither a referent nor "
                "contextual objects ('ann_id' and 'context_ann_ids' are None), expected boxes to "
                "train on; train on a data set that has them, or make pseudo ground truth with "
                "tools/prepare_data.py --detections (MODEL.VLNMS.PSEUDO_GT.DIR)"
            )
        reliable = [] if referent is None else [annotations[referent]]
        others = []
        if self.with_context or referent is None:
            reliable += [annotations[i] for i in context or []]
            others = [
                {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": -1}
                for box in pseudo or []
            ]
        foreground = reliable + others
        # float64, since transforms work in place and would truncate integers.
        boxes = np.array([_xyxy(a) for a in foreground], dtype=np.float64).reshape(-1, 4)
        target = Instances(image_size)
        target.gt_boxes = Boxes(torch.from_numpy(transform.apply_box(boxes)).float())
        target.gt_boxes.clip(image_size)
        classes = [a["category_id"] for a in foreground]
        target.gt_classes = torch.tensor(classes, dtype=torch.int64)
        target.gt_reliable = torch.arange(len(foreground)) < len(reliable)
        return target


def _xyxy(annotation: dict) -> list[float]:
    return list(BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS))


def read_image(file_name: str | Path, image_format: str) -> np.ndarray:
    """Detectron2's `read_image` (which applies EXIF orientation), with errors that name the file.

    Returns:
        uint8 [H, W, 3].

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not an image, is truncated, or has an absurd size, or pixels of more
            than 8 bits.
    """
    try:
        with PathManager.open(str(file_name), "rb") as file:
            with Image.open(file) as image:
                image.verify()  # PNG's checksums, which are not looked at in decoding
            file.seek(0)
            with Image.open(file) as image:
                return pillow_to_array(image, image_format)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no image file {file_name}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{file_name} cannot be read as an image ({error}); expected a complete JPEG, PNG or "
            "other file that Pillow reads"
        ) from error


def pillow_to_array(image: Image.Image, image_format: str) -> np.ndarray:
    """uint8 [H, W, 3] of an image of Pillow, after its EXIF orientation.

    Raises:
        ValueError: a pixel is one number of more than 8 bits, which Pillow would cut off at 255.
    """
    if image.mode[0] in "IF":
        raise ValueError(
            f"its pixels have more than 8 bits (Pillow's mode {image.mode}); scale them to 8 bits"
        )
    image = detection_utils._apply_exif_orientation(image)
    return np.ascontiguousarray(detection_utils.convert_PIL_to_numpy(image, image_format))


def resize(
    augmentation: T.Augmentation, image: np.ndarray, name: str
) -> tuple[np.ndarray, T.Transform]:
    """The resized image, and how. ValueError names an image too thin for any pixel to be left."""
    aug_input = T.AugInput(image)
    try:
        transform = augmentation(aug_input)
    except ValueError as error:
        height, width = image.shape[:2]
        raise ValueError(
            f"{name}: {width}x{height} pixels is too thin to be resized ({error}); crop it, or "
            "raise INPUT.MAX_SIZE_TEST (INPUT.MAX_SIZE_TRAIN)"
        ) from error
    return aug_input.image, transform
