"""What the frozen detector says of the boxes that second stages choose from.

Each image goes through the detector once, whatever the number of models and queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, BoxMode, Instances
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlnms_d2.data.mapper import GroundingMapper
from vlnms_d2.engine.predictor import VLNMSPredictor
from vlnms_d2.modeling.assembly import QueryResult
from vlnms_d2.modeling.candidates import Candidates
from vlnms_d2.modeling.text import TextFeatures

from .store import ImageRegions


@dataclass
class Looked:
    """What the detector made of an image.

    Attributes:
        features: of the backbone.
        proposals: of the RPN.
        scale: float [4], what boxes in pixels of the image file are multiplied with to be in
            pixels of the network's input.
        size: (height, width) of the image file.
        image_id: of the data set.
        detections: what the head's `detect` gave, once it was asked.
    """

    features: dict[str, Tensor]
    proposals: list[Instances]
    scale: Tensor
    size: tuple[int, int]
    image_id: int
    detections: tuple[list[Candidates], list[Instances]] | None = None

    @property
    def input_size(self) -> tuple[int, int]:
        return self.proposals[0].image_size


class RegionExtractor:
    """Boxes of images with their features, from annotations, a detector and any VL-NMS on it.

    The feature of a box is the vector of the detector's box head, then the mean and the standard
    deviation of each channel of the pooled map: MAttNet too takes features of two depths, as
    the deeper ones know classes and hardly colours.

    Args:
        configs: of each VL-NMS by name, at least one; all on the same detector. Their proposals are
            kept down to the config's `FINAL_SCORE_THRESH`.

    Raises:
        ValueError: the models have different detectors.
    """

    def __init__(self, configs: Mapping[str, CfgNode]):
        self.models = {name: VLNMSPredictor(cfg).model for name, cfg in configs.items()}
        first_name, self.model = next(iter(self.models.items()))
        for name, model in self.models.items():
            if not _same_detector(self.model, model):
                raise ValueError(
                    f"{name} has another detector than {first_name}: extract their proposals apart"
                )
        self._encoded: dict[str, tuple[list[str], TextFeatures]] = {}
        self.mapper = GroundingMapper(next(iter(configs.values())), is_train=False)
        self.encoder = self.model.roi_heads.get_submodule(
            self.model.roi_heads.visual_encoder_source
        )

    @torch.no_grad()
    def look(self, dataset_dict: dict) -> Looked:
        """Run backbone and RPN on the image of a dataset dict."""
        image_input = self.mapper({**dataset_dict, "annotations": [], "expressions": []})
        images = self.model.preprocess_image([image_input])
        features = self.model.backbone(images.tensor)
        proposals, _ = self.model.proposal_generator(images, features, None)
        size = image_input["height"], image_input["width"]
        height, width = images.image_sizes[0]
        scale = torch.tensor([width / size[1], height / size[0]] * 2)
        return Looked(features, proposals, scale, size, dataset_dict["image_id"])

    def annotated(self, looked: Looked, dataset_dict: dict) -> ImageRegions:
        """The annotated boxes of the image."""
        annotations = dataset_dict["annotations"]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4) * looked.scale
        classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
        regions = self._regions(looked, boxes, classes, torch.ones(len(boxes)))
        regions.ids = torch.tensor([a["id"] for a in annotations], dtype=torch.int64)
        return regions

    @torch.no_grad()
    def detected(self, looked: Looked) -> ImageRegions:
        """The detector's own result, by falling confidence."""
        _, [stock] = self._detect(looked)
        order = stock.scores.argsort(descending=True, stable=True)
        boxes = stock.pred_boxes.tensor[order]
        return self._regions(looked, boxes, stock.pred_classes[order], stock.scores[order])

    @torch.no_grad()
    def query_aware(
        self,
        looked: Looked,
        name: str,
        queries: Sequence[str],
        sent_ids: Sequence[int],
    ) -> ImageRegions:
        """The proposals of a VL-NMS for each query.

        Args:
            looked: the image.
            name: of the model.
            queries: Q strings.
            sent_ids: their numbers.
        """
        head = self.models[name].roi_heads
        candidates, _ = self._detect(looked)
        # `head.answer` in steps, as a split's captions are asked on every image: to encode them
        # each time would take most of the time.
        with head.own_precision():
            [visual] = head.encode_candidates(candidates)
            text = self._encode_queries(name, list(queries))
        answer = head.answer_image(candidates[0], looked.input_size, visual, text)
        own = answer.distinct
        regions = self._regions(
            looked, answer.boxes, answer.candidates.classes[own], answer.candidates.scores[own]
        )
        regions.sent_ids = torch.tensor(sent_ids, dtype=torch.int64)
        regions.kept, regions.kept_scores = _per_query(answer, len(queries))
        return regions

    def _encode_queries(self, name: str, queries: list[str]) -> TextFeatures:
        asked, text = self._encoded.get(name, (None, None))
        if asked != queries:
            [text] = self.models[name].roi_heads.vlnms.encode_queries([queries])
            self._encoded[name] = queries, text
        return text

    def _detect(self, looked: Looked) -> tuple[list[Candidates], list[Instances]]:
        if looked.detections is None:
            looked.detections = self.model.roi_heads.detect(looked.features, looked.proposals)
        return looked.detections

    @torch.no_grad()
    def _regions(
        self, looked: Looked, boxes: Tensor, classes: Tensor, scores: Tensor
    ) -> ImageRegions:
        head = self.model.roi_heads
        pooled = head.pool_boxes(looked.features, [Boxes(boxes)])
        deep = head.encode_pooled(self.encoder, pooled)
        cells = pooled.flatten(2)
        # Over no box at all, a deviation would be undefined.
        spread = (cells - cells.mean(2, keepdim=True)).square().mean(2).sqrt()
        features = torch.cat([deep, cells.mean(2), spread], dim=1)
        return ImageRegions(
            looked.image_id,
            looked.size,
            boxes / looked.scale,
            classes,
            scores,
            features.half(),
        )


def _same_detector(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models have the same candidates on every image."""
    for setting in ("score_thresh", "max_candidates", "visual_encoder"):
        if getattr(model.roi_heads, setting) != getattr(other.roi_heads, setting):
            return False

    def detector(one: torch.nn.Module) -> dict[str, Tensor]:
        return {k: v for k, v in one.state_dict().items() if ".vlnms." not in k}

    own, others = detector(model), detector(other)
    return own.keys() == others.keys() and all(torch.equal(v, others[k]) for k, v in own.items())


def _per_query(answer: QueryResult, num_queries: int) -> tuple[Tensor, Tensor]:
    """Which of the answer's distinct boxes each query keeps, int64 [Q, K] padded with -1, and their
    fused scores, float32 [Q, K]."""
    position = torch.arange(len(answer.distinct))[answer.position]
    counts = answer.query_index.bincount(minlength=num_queries).tolist()
    kept = pad_sequence(position.split(counts), batch_first=True, padding_value=-1)
    return kept, pad_sequence(answer.scores.split(counts), batch_first=True)
