"""Image-text retrieval: R@K both ways and their sum.

Source: VL-NMS, Sec. 4.4; the protocols are those of VSE++ and SCAN.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tabulate import tabulate

from .records import gather_records, write_results

logger = logging.getLogger(__name__)

RESULTS_VERSION = 1
RANKS = (1, 5, 10)
FOLD = 1000


def retrieval_recall(similarities: np.ndarray, image_of_caption: np.ndarray) -> dict[str, float]:
    """R@K of sentence retrieval (an image asks) and image retrieval (a caption asks), in percent.

    A query is answered if one of its own is among the K best; what is as similar as its own best
    counts as better, so that a model that cannot tell gets nothing.

    Args:
        similarities: float [I, C], of images and captions.
        image_of_caption: int [C], the row of each caption's image.

    Returns:
        "sentence_r@K" and "image_r@K" for K 1, 5, 10, and "r@sum", the sum of all six.

    Raises:
        ValueError: the shapes do not fit, a number is not finite, or an image has no caption.
    """
    similarities, image_of_caption = np.asarray(similarities), np.asarray(image_of_caption)
    _check(similarities, image_of_caption)
    own = np.arange(len(similarities))[:, None] == image_of_caption[None, :]
    # Of an image, its best caption stands for all five; of a caption there is one image.
    best_own = np.where(own, similarities, -np.inf).max(axis=1, keepdims=True)
    sentence_ranks = (~own & (similarities >= best_own)).sum(axis=1)
    of_own_image = similarities[image_of_caption, np.arange(len(image_of_caption))]
    image_ranks = (~own & (similarities >= of_own_image)).sum(axis=0)
    recall = {f"sentence_r@{k}": 100.0 * float((sentence_ranks < k).mean()) for k in RANKS}
    recall |= {f"image_r@{k}": 100.0 * float((image_ranks < k).mean()) for k in RANKS}
    return recall | {"r@sum": sum(recall.values())}


def five_fold_recall(
    similarities: np.ndarray, image_of_caption: np.ndarray, fold: int = FOLD
) -> dict[str, float]:
    """COCO's 1K protocol: the images in folds of 1,000, in their order, each a retrieval of its
    own; the mean over the folds.

    Args:
        similarities, image_of_caption: see `retrieval_recall`.
        fold: images of a fold.

    Raises:
        ValueError: the number of images is no multiple of `fold`, or see `retrieval_recall`.
    """
    similarities, image_of_caption = np.asarray(similarities), np.asarray(image_of_caption)
    if not len(similarities) or len(similarities) % fold:
        raise ValueError(
            f"{len(similarities)} images make no whole folds of {fold}; evaluate them at once "
            "(retrieval_recall), or give all 5,000 of COCO's test split"
        )
    folds = []
    for start in range(0, len(similarities), fold):
        captions = (image_of_caption >= start) & (image_of_caption < start + fold)
        part = similarities[start : start + fold, captions]
        folds.append(retrieval_recall(part, image_of_caption[captions] - start))
    return {key: float(np.mean([one[key] for one in folds])) for key in folds[0]}


class RetrievalEvaluator(DatasetEvaluator):
    """Retrieval among all images and captions of a data set.

    `process` takes inputs with "image_id" and outputs with "similarities": float [C], how well each
    caption of the data set fits the image, in the order of `caption_ids`. Each image is counted
    once, however often it is seen; all must be seen before `evaluate`.

    Args:
        dataset_name: names the results.
        dataset_dicts: images with captions ("expressions" with "sent_id").
        output_dir: where `retrieval_{dataset_name}.json` is written; None writes nothing.
        fold: where the images make several whole folds of so many, the mean over these (COCO's 1K)
            is given beside the retrieval among all of them (5K).
        distributed: gather the images of all processes.

    Attributes:
        caption_ids: of all captions, image by image in the order of the data set.
        results: all results of the last `evaluate`, on the main process, as written to the file.
    """

    def __init__(
        self,
        dataset_name: str,
        dataset_dicts: Sequence[dict[str, Any]],
        *,
        output_dir: str | None = None,
        fold: int = FOLD,
        distributed: bool = True,
    ):
        self.dataset_name = dataset_name
        self.output_dir = output_dir
        self.fold = fold
        self.distributed = distributed
        self.results: dict[str, Any] | None = None
        self.image_ids = [one["image_id"] for one in dataset_dicts]
        self.caption_ids = [e["sent_id"] for one in dataset_dicts for e in one["expressions"]]
        self._image_of_caption = np.repeat(
            np.arange(len(dataset_dicts)), [len(one["expressions"]) for one in dataset_dicts]
        )
        self._rows: dict[int, np.ndarray] = {}

    def reset(self) -> None:
        """Forget all images."""
        self._rows = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take in a batch; see the class.

        Raises:
            ValueError: a row has another length than the data set has captions.
        """
        for image_input, output in zip(inputs, outputs, strict=True):
            row = torch.as_tensor(output["similarities"]).detach().float().cpu().numpy()
            if row.shape != (len(self.caption_ids),):
                raise ValueError(
                    f"image {image_input['image_id']}: the similarities have the shape "
                    f"{list(row.shape)}, expected one for each of the {len(self.caption_ids)} "
                    f"captions of {self.dataset_name}"
                )
            self._rows[image_input["image_id"]] = row

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Evaluate; prints a table and writes the file.

        Returns:
            `{"retrieval": {name: number}}` on the main process, in percent; names of the mean over
            folds have a hyphen. Empty on the other processes, and where no image was seen.

        Raises:
            ValueError: some images were not seen.
        """
        rows = gather_records(self._rows, self.distributed)
        if not comm.is_main_process():
            return OrderedDict()
        if not rows:
            logger.warning("[RetrievalEvaluator] Did not receive any images.")
            return OrderedDict()
        missing = [image_id for image_id in self.image_ids if image_id not in rows]
        if missing:
            raise ValueError(
                f"{len(missing)} of the {len(self.image_ids)} images of {self.dataset_name} were "
                f"not seen, such as {missing[0]}; retrieval is among all of them"
            )
        similarities = np.stack([rows[image_id] for image_id in self.image_ids])
        self.results = {
            "version": RESULTS_VERSION,
            "dataset": self.dataset_name,
            "images": len(self.image_ids),
            "captions": len(self.caption_ids),
            "all": retrieval_recall(similarities, self._image_of_caption),
        }
        num_folds, rest = divmod(len(similarities), self.fold)
        if num_folds > 1 and not rest:
            self.results[f"folds_of_{self.fold}"] = five_fold_recall(
                similarities, self._image_of_caption, self.fold
            )
        write_results(self.output_dir, f"retrieval_{self.dataset_name}", self.results)
        logger.info("Retrieval on %s:\n%s", self.dataset_name, format_table(self.results))
        return OrderedDict(retrieval=flat_results(self.results))


def flat_results(results: Mapping[str, Any]) -> dict[str, float]:
    """The results as one level of numbers, in Detectron2's manner."""
    flat = dict(results["all"])
    for name, numbers in results.items():
        if name.startswith("folds_of_"):
            flat |= {f"{key}-{name}": value for key, value in numbers.items()}
    return flat


def format_table(results: Mapping[str, Any]) -> str:
    """The results as a table to print."""
    rows = [
        {"": name, **numbers}
        for name, numbers in results.items()
        if name == "all" or name.startswith("folds_of_")
    ]
    return tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".2f")


def _check(similarities: np.ndarray, image_of_caption: np.ndarray) -> None:
    if similarities.ndim != 2 or similarities.shape[1:] != image_of_caption.shape:
        raise ValueError(
            f"similarities {list(similarities.shape)} do not fit {list(image_of_caption.shape)} "
            "captions, expected [images, captions] and [captions]"
        )
    if not np.isfinite(similarities).all():
        raise ValueError("some similarities are not finite numbers; retrieval cannot rank them")
    without = np.setdiff1d(np.arange(len(similarities)), image_of_caption)
    if len(without):
        raise ValueError(
            f"image number {without[0]} has no caption, expected at least one for each image"
        )
