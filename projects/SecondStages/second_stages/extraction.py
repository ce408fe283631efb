"""Extraction of the boxes that second stages choose from, with features of the frozen detector.

Each image goes through the detector once, whatever the number of models and queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from vlnms_d2.config import load_config
from vlnms_d2.data.dataset_mapper import GroundingMapper
from vlnms_d2.engine.predictor import VLNMSPredictor
from vlnms_d2.modeling.assembly import QueryResult
from vlnms_d2.modeling.candidates import Candidates
from vlnms_d2.modeling.text import TextFeatures

from .store import DETECTOR, GROUND_TRUTH, ImageRegions, regions_file, save_regions


@dataclass
class DetectorFeatures:
    """The output of the detector for one image.

    Attributes:
        maps: feature maps of the backbone.
        proposals: the proposals of the RPN.
        scale: float [4], factors from pixels of the image file to pixels of the network's input,
            for boxes xyxy.
        size: (height, width) of the image file.
        image_id: id of the image in its data set.
        detections: the output of the head's `detect`, computed on first use.
    """

    maps: dict[str, Tensor]
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

    The feature of a box concatenates the vector of the detector's box head with the mean and the
    standard deviation of each channel of the pooled map. MAttNet also uses features of two depths,
    as the deeper ones encode classes but hardly colors.

    Args:
        configs: config of each VL-NMS by name, at least one; all with the same detector. Proposals
            are kept down to the config's `FINAL_SCORE_THRESH`.

    Raises:
        ValueError: the models have different detectors.
    """

    def __init__(self, configs: Mapping[str, CfgNode]):
        self.models = {name: VLNMSPredictor(cfg).model for name, cfg in configs.items()}
        first_name, self.model = next(iter(self.models.items()))
        for name, model in self.models.items():
            if not _same_detector(self.model, model):
                raise ValueError(
                    f"{name} has another detector than {first_name}: extract their proposals in "
                    "separate calls"
                )
        self._encoded: dict[str, tuple[list[str], TextFeatures]] = {}
        self.mapper = GroundingMapper(next(iter(configs.values())), is_train=False)
        self.encoder = self.model.roi_heads.get_submodule(
            self.model.roi_heads.visual_encoder_source
        )

    @torch.no_grad()
    def run_detector(self, dataset_dict: dict) -> DetectorFeatures:
        """Run backbone and RPN on the image of a dataset dict."""
        image_input = self.mapper({**dataset_dict, "annotations": [], "expressions": []})
        images = self.model.preprocess_image([image_input])
        maps = self.model.backbone(images.tensor)
        proposals, _ = self.model.proposal_generator(images, maps, None)
        size = image_input["height"], image_input["width"]
        height, width = images.image_sizes[0]
        scale = torch.tensor([width / size[1], height / size[0]] * 2)
        return DetectorFeatures(maps, proposals, scale, size, dataset_dict["image_id"])

    def annotated(self, features: DetectorFeatures, dataset_dict: dict) -> ImageRegions:
        """The annotated boxes of the image."""
        annotations = dataset_dict["annotations"]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4) * features.scale
        classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
        regions = self._regions(features, boxes, classes, torch.ones(len(boxes)))
        regions.ids = torch.tensor([a["id"] for a in annotations], dtype=torch.int64)
        return regions

    @torch.no_grad()
    def detected(self, features: DetectorFeatures) -> ImageRegions:
        """The detections of the stock detector, in descending order of confidence."""
        _, [stock] = self._detect(features)
        order = stock.scores.argsort(descending=True, stable=True)
        boxes = stock.pred_boxes.tensor[order]
        return self._regions(features, boxes, stock.pred_classes[order], stock.scores[order])

    @torch.no_grad()
    def query_aware(
        self,
        features: DetectorFeatures,
        name: str,
        queries: Sequence[str],
        sent_ids: Sequence[int],
    ) -> ImageRegions:
        """The proposals of a VL-NMS for each query.

        Args:
            features: of the image.
            name: of the VL-NMS.
            queries: Q strings.
            sent_ids: their ids.
        """
        head = self.models[name].roi_heads
        candidates, _ = self._detect(features)
        # The steps of `head.answer`, with the text encoded only once: all captions of a split may
        # be asked on every image, and encoding them would take most of the time.
        with head.own_precision():
            [visual] = head.encode_candidates(candidates)
            text = self._encode_queries(name, list(queries))
        answer = head.answer_image(candidates[0], features.input_size, visual, text)
        index = answer.distinct
        regions = self._regions(
            features,
            answer.boxes,
            answer.candidates.classes[index],
            answer.candidates.scores[index],
        )
        regions.sent_ids = torch.tensor(sent_ids, dtype=torch.int64)
        regions.kept, regions.kept_scores = _per_query(answer, len(queries))
        return regions

    def _encode_queries(self, name: str, queries: list[str]) -> TextFeatures:
        encoded_queries, text = self._encoded.get(name, (None, None))
        if encoded_queries != queries:
            [text] = self.models[name].roi_heads.vlnms.encode_queries([queries])
            self._encoded[name] = queries, text
        return text

    def _detect(self, features: DetectorFeatures) -> tuple[list[Candidates], list[Instances]]:
        if features.detections is None:
            features.detections = self.model.roi_heads.detect(features.maps, features.proposals)
        return features.detections

    @torch.no_grad()
    def _regions(
        self, features: DetectorFeatures, boxes: Tensor, classes: Tensor, scores: Tensor
    ) -> ImageRegions:
        head = self.model.roi_heads
        pooled = head.pool_boxes(features.maps, [Boxes(boxes)])
        deep = head.encode_pooled(self.encoder, pooled)
        cells = pooled.flatten(2)
        # Not `std`, which is undefined when there are no boxes.
        spread = (cells - cells.mean(2, keepdim=True)).square().mean(2).sqrt()
        descriptors = torch.cat([deep, cells.mean(2), spread], dim=1)
        return ImageRegions(
            features.image_id,
            features.size,
            boxes / features.scale,
            classes,
            scores,
            descriptors.half(),
        )


def _same_detector(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models have the same candidates on every image."""
    for setting in ("score_thresh", "max_candidates", "visual_encoder"):
        if getattr(model.roi_heads, setting) != getattr(other.roi_heads, setting):
            return False

    a, b = (
        {k: v for k, v in each.state_dict().items() if ".vlnms." not in k}
        for each in (model, other)
    )
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def _per_query(answer: QueryResult, num_queries: int) -> tuple[Tensor, Tensor]:
    """Which of the answer's distinct boxes each query keeps, int64 [Q, K] padded with -1, and their
    fused scores, float32 [Q, K]."""
    position = torch.arange(len(answer.distinct))[answer.position]
    counts = answer.query_index.bincount(minlength=num_queries).tolist()
    kept = pad_sequence(position.split(counts), batch_first=True, padding_value=-1)
    return kept, pad_sequence(answer.scores.split(counts), batch_first=True)


def read_configs(
    entries: Sequence[str], sources: Sequence[str], floor: float, top: int | None
) -> dict[str, CfgNode]:
    """The config of each VL-NMS by name.

    Args:
        entries: NAME=CONFIG for each VL-NMS.
        sources: the requested sources.
        floor: minimum fused score of the proposals; without effect where `top` is given.
        top: number of boxes of every image or query, whatever their score.

    Raises:
        ValueError: an entry is not NAME=CONFIG, or a source has no config.
    """
    configs = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals or name in (GROUND_TRUTH, DETECTOR):
            raise ValueError(f"--proposals {entry!r}: expected NAME=CONFIG, as vlnms_fc=fc.yaml")
        cfg = load_config(path)
        cfg.MODEL.MASK_ON = False
        cfg.MODEL.VLNMS.FINAL_SCORE_THRESH = floor if top is None else 0.0
        if top is not None:
            cfg.TEST.DETECTIONS_PER_IMAGE = top
        configs[name] = cfg
    unknown = set(sources) - {GROUND_TRUTH, DETECTOR, *configs}
    if unknown:
        raise ValueError(
            f"--what {min(unknown)}: expected {GROUND_TRUTH}, {DETECTOR} or a name of --proposals "
            f"({', '.join(configs)})"
        )
    return configs


def extract_datasets(
    names: Sequence[str],
    sources: Sequence[str],
    configs: Mapping[str, CfgNode],
    out: Path,
    *,
    all_pairs: bool,
    group_size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write the file of every data set and source that does not exist yet.

    Args:
        names: of registered data sets.
        sources: "gt", "detector" or a name of `configs`.
        configs: see `read_configs`.
        out: folder of the files.
        all_pairs: each VL-NMS answers all queries of the data set on every image.
        group_size: with `all_pairs`, only the queries of a group of this many images.
        overwrite: also replace files that exist.
    """
    missing = {}
    for name in names:
        files = {source: regions_file(out, name, source) for source in sources}
        missing_sources = [s for s, path in files.items() if overwrite or not path.exists()]
        if missing_sources:
            missing[name] = missing_sources
    if not missing:
        return
    extractor = RegionExtractor(configs)
    datasets = {name: DatasetCatalog.get(name) for name in missing}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, images in datasets.items():
        groups.setdefault(tuple(sorted(one["file_name"] for one in images)), []).append(name)
    for files, group in groups.items():
        regions = {(name, source): [] for name in group for source in missing[name]}
        by_file = {name: {one["file_name"]: one for one in datasets[name]} for name in group}
        queries = {name: _queries_by_image(datasets[name], all_pairs, group_size) for name in group}
        for file in tqdm(files, unit="image", desc=" ".join(group)):
            features = extractor.run_detector(by_file[group[0]][file])
            for name, source in regions:
                image = by_file[name][file]
                regions[name, source].append(
                    _extract(extractor, features, source, image, queries[name][image["image_id"]])
                )
        for (name, source), images in regions.items():
            save_regions(regions_file(out, name, source), images)


def _queries_by_image(
    dataset_dicts: Sequence[dict], all_pairs: bool, group_size: int | None
) -> dict[int, Sequence[dict]]:
    """For each image the expressions that a VL-NMS answers on it."""
    if not all_pairs:
        return {one["image_id"]: one["expressions"] for one in dataset_dicts}
    size = group_size or len(dataset_dicts)
    queries = {}
    for start in range(0, len(dataset_dicts), size):
        group = dataset_dicts[start : start + size]
        expressions = [e for one in group for e in one["expressions"]]
        queries.update({one["image_id"]: expressions for one in group})
    return queries


def _extract(
    extractor: RegionExtractor,
    features: DetectorFeatures,
    source: str,
    dataset_dict: dict,
    expressions: Sequence[dict],
) -> ImageRegions:
    """The boxes of an image from a source; of a VL-NMS, those for the expressions."""
    if source == GROUND_TRUTH:
        return extractor.annotated(features, dataset_dict)
    if source == DETECTOR:
        return extractor.detected(features)
    queries = [e["query"] for e in expressions]
    return extractor.query_aware(features, source, queries, [e["sent_id"] for e in expressions])
