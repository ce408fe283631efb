"""Names and category ids of a detector's classes."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog


def detector_classes(
    cfg: CfgNode, dataset: str, categories_of: str | None = None
) -> tuple[list[int], list[str]]:
    """The category id and the name of each class, of a data set's metadata.

    Args:
        cfg: of the model.
        dataset: a registered name.
        categories_of: the data set whose classes they are; None takes the first of `dataset`, the
            config's test and its training sets that has `MODEL.ROI_HEADS.NUM_CLASSES` of them.

    Returns:
        Ids and names by class. Where the data set has no ids, the classes' numbers.

    Raises:
        ValueError: no data set has as many.
    """
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    names: Sequence[str] = (dataset, *cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
    if categories_of is not None:
        names = [categories_of]
    for name in names:
        metadata = MetadataCatalog.get(name)
        things = metadata.get("thing_classes") or ()
        if len(things) == num_classes:
            class_of = metadata.get("thing_dataset_id_to_contiguous_id")
            class_of = class_of or {number: number for number in range(num_classes)}
            id_of = {number: category_id for category_id, number in class_of.items()}
            return [id_of[number] for number in range(num_classes)], list(things)
    raise ValueError(
        f"none of {', '.join(dict.fromkeys(names))} has the names of {num_classes} classes "
        "(MODEL.ROI_HEADS.NUM_CLASSES). Name a data set that has the detector's, with "
        "--categories-of, as coco_2017_val."
    )
