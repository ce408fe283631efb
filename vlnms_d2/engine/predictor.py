"""A predictor for one image and its queries, like Detectron2's `DefaultPredictor`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from PIL import Image

from ..data.mapper import pillow_to_array, resize
from ..modeling.postprocessing import split_by_query
from ..modeling.queries import as_query_list, query_head
from .checkpoint import load_weights


class VLNMSPredictor(DefaultPredictor):
    """Query-aware proposals of one image at a time.

    Builds the model that the config describes, loads `MODEL.WEIGHTS` and resizes images by
    `INPUT.MIN_SIZE_TEST` and `INPUT.MAX_SIZE_TEST`::

        predictor = VLNMSPredictor(cfg)
        red, left = predictor(cv2.imread("input.jpg"), ["red cup", "the left chair"])
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: with the weights; see `load_weights` for what they have to hold.

        Raises:
            ValueError: the weights do not fit, or the model has no VL-NMS head.
        """
        without = cfg.clone()
        without.defrost()
        without.MODEL.WEIGHTS = ""
        super().__init__(without)
        self.cfg = cfg.clone()
        query_head(self.model)
        load_weights(cfg, self.model)

    def __call__(
        self, image: np.ndarray | Image.Image, queries: str | Sequence[str]
    ) -> list[Instances]:
        """Proposals for each query.

        Args:
            image: uint8 [H, W, 3], BGR; or an image of Pillow.
            queries: one or several.

        Returns:
            One Instances per query, in descending order of the fused score, with `pred_boxes`
            (xyxy in pixels of `image`), `scores` (s), `cls_scores` (c), `relatedness` (r),
            `pred_classes`, `query_index` and, where the config has masks, `pred_masks` [n, H, W].

        Raises:
            TypeError: a query is not a string.
            ValueError: the image has another shape or type, or is too thin to be resized.
        """
        queries = as_query_list(queries)
        output = self._run([{**self.prepare(image), "query": queries}])
        return split_by_query(output[0], len(queries))

    def compare(
        self, image: np.ndarray | Image.Image, queries: str | Sequence[str]
    ) -> tuple[Instances, list[Instances]]:
        """The detector's own proposals and those of each query.

        Arguments and errors are those of `__call__`.

        Returns:
            The stock detector's Instances, and one Instances per query.
        """
        queries = as_query_list(queries)
        model_input = self.prepare(image)
        detector, instances = self._run(
            [{**model_input, "query": None}, {**model_input, "query": queries}]
        )
        return detector, split_by_query(instances, len(queries))

    @torch.no_grad()
    def _run(self, batched_inputs: list[dict]) -> list[Instances]:
        return [output["instances"] for output in self.model(batched_inputs)]

    def prepare(self, image: np.ndarray | Image.Image, name: str = "the image") -> dict:
        """The model input for an image, without a query; see `__call__`. Errors have the name."""
        image = pillow_to_array(image, "BGR") if isinstance(image, Image.Image) else image
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype != np.uint8:
            raise ValueError(
                f"{name} must be a uint8 array [H, W, 3] in BGR order, got {image.dtype} "
                f"{list(image.shape)}; cv2.imread returns such an array (None for a bad file)"
            )
        if self.input_format == "RGB":
            image = image[:, :, ::-1]
        height, width = image.shape[:2]
        resized, _ = resize(self.aug, image, name)
        chw = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        return {"image": chw, "height": height, "width": width}
