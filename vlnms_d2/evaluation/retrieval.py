"""Image-text retrieval: R@K both ways and their sum.

Source: VL-NMS, Sec. 4.4; the protocols are those of VSE++ and SCAN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .base import RecordEvaluator, report_groups

RANKS = (1, 5, 10)
FOLD = 1000
CAPTIONS = 5  # of an image in the published protocols: 25,000 of COCO's 25,010 for testing


def retrieval_recall(similarities: np.ndarray, image_of_caption: np.ndarray) -> dict[str, float]:
    """R@K in percent of sentence retrieval (queries are images) and image retrieval (captions).

    A query is answered if a match of it is among the K most similar items. Ties count against the
    model: items as similar as the best match rank before it, so that equal similarities for all
    score zero.

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
    matches = np.arange(len(similarities))[:, None] == image_of_caption[None, :]  # [I, C]
    # An image is ranked by the best of its captions; a caption has one image.
    best_match = np.where(matches, similarities, -np.inf).max(axis=1, keepdims=True)  # [I, 1]
    sentence_ranks = (~matches & (similarities >= best_match)).sum(axis=1)
    of_its_image = similarities[image_of_caption, np.arange(len(image_of_caption))]  # [C]
    image_ranks = (~matches & (similarities >= of_its_image)).sum(axis=0)
    recall = {f"sentence_r@{k}": 100.0 * float((sentence_ranks < k).mean()) for k in RANKS}
    recall |= {f"image_r@{k}": 100.0 * float((image_ranks < k).mean()) for k in RANKS}
    return recall | {"r@sum": sum(recall.values())}


def five_fold_recall(
    similarities: np.ndarray, image_of_caption: np.ndarray, fold: int = FOLD
) -> dict[str, float]:
    """COCO's 1K protocol: retrieval within each fold of 1,000 consecutive images; the mean over
    the folds.

    Args:
        similarities, image_of_caption: see `retrieval_recall`.
        fold: images of a fold.

    Raises:
        ValueError: the number of images is no multiple of `fold`, or see `retrieval_recall`.
    """
    similarities, image_of_caption = np.asarray(similarities), np.asarray(image_of_caption)
    if not len(similarities) or len(similarities) % fold:
        raise ValueError(
            f"{len(similarities)} images make no whole folds of {fold}; evaluate them together "
            "(retrieval_recall), or give all 5,000 of COCO's test split"
        )
    folds = []
    for start in range(0, len(similarities), fold):
        captions = (image_of_caption >= start) & (image_of_caption < start + fold)
        part = similarities[start : start + fold, captions]
        folds.append(retrieval_recall(part, image_of_caption[captions] - start))
    return {key: float(np.mean([recall[key] for recall in folds])) for key in folds[0]}


class RetrievalEvaluator(RecordEvaluator):
    """Retrieval among all images and captions of a data set.

    `process` takes inputs with "image_id" and outputs with "similarities": float [C], how well each
    caption of the data set fits the image, in the order of `caption_ids`. An image is counted once
    however often it is processed; all must be processed before `evaluate`.

    Args:
        dataset_name: names the results.
        dataset_dicts: images with captions ("expressions" with "sent_id").
        output_dir: where `retrieval_{dataset_name}.json` is written; None writes nothing.
        captions_per_image: the first captions of each image that are ranked, as published; None
            ranks all of them.
        fold: images per fold, in the order of the data set. Where the images make several whole
            folds, the mean over these (COCO's 1K) is given beside the retrieval among all of them
            (5K).
        distributed: gather the images of all processes.

    Attributes:
        caption_ids: of all captions, image by image in the order of the data set.
        results: all results of the last `evaluate`, on the main process, as written to the file;
            in percent.
    """

    task, title = "retrieval", "Retrieval"
    items = "images"

    def __init__(
        self,
        dataset_name: str,
        dataset_dicts: Sequence[dict[str, Any]],
        *,
        output_dir: str | None = None,
        captions_per_image: int | None = CAPTIONS,
        fold: int = FOLD,
        distributed: bool = True,
    ):
        super().__init__(dataset_name, output_dir, distributed)
        self.fold = fold
        self.image_ids = [image["image_id"] for image in dataset_dicts]
        self.caption_ids = [e["sent_id"] for image in dataset_dicts for e in image["expressions"]]
        counts = [len(image["expressions"]) for image in dataset_dicts]
        number_in_image = np.concatenate([np.arange(count) for count in [0, *counts]])
        self._ranked = number_in_image < (captions_per_image or np.inf)  # bool [C]
        self._image_of_caption = np.repeat(np.arange(len(counts)), counts)[self._ranked]

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Add a batch; see the class.

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
            self._records[image_input["image_id"]] = row

    def _summarize(self, records: dict[Any, np.ndarray]) -> dict[str, Any]:
        missing = [image_id for image_id in self.image_ids if image_id not in records]
        if missing:
            raise ValueError(
                f"{len(missing)} of the {len(self.image_ids)} images of {self.dataset_name} are "
                f"missing, such as {missing[0]}; retrieval is among all of them"
            )
        similarities = np.stack([records[image_id][self._ranked] for image_id in self.image_ids])
        results = {
            "images": len(self.image_ids),
            "captions": len(self._image_of_caption),
            "all": retrieval_recall(similarities, self._image_of_caption),
        }
        num_folds, rest = divmod(len(similarities), self.fold)
        if num_folds > 1 and not rest:
            results[f"folds_of_{self.fold}"] = five_fold_recall(
                similarities, self._image_of_caption, self.fold
            )
        return results

    def _report(self, results: dict[str, Any]) -> tuple[str, dict[str, float]]:
        return report(results)


def report(results: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """The results as a table to print, and as a flat dictionary as Detectron2 expects it."""
    return report_groups({key: value for key, value in results.items() if isinstance(value, dict)})


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
