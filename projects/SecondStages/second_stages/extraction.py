"""Extraction of the boxes that second stages choose from, with features of the frozen detector.

Each image goes through the detector once, whatever the number of models and queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, BoxMode
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from vlnms_d2.config import load_config
from vlnms_d2.data.builtin import registered_images
from vlnms_d2.data.mapper import GroundingMapper
from vlnms_d2.engine.predictor import VLNMSPredictor
from vlnms_d2.file_io import claim, refuse_foreign
from vlnms_d2.modeling.feature_extraction import ImageFeatures, extract_features
from vlnms_d2.modeling.postprocessing import QueryResult
from vlnms_d2.modeling.text import TextFeatures

from .store import DETECTOR, GROUND_TRUTH, ImageRegions, regions_file, save_regions


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

    def run_detector(self, dataset_dict: dict) -> ImageFeatures:
        """Run the detector on the image of a dataset dict."""
        image_input = self.mapper({**dataset_dict, "annotations": [], "expressions": []})
        return extract_features(self.model, image_input)

    def annotated(self, image: ImageFeatures, dataset_dict: dict) -> ImageRegions:
        """The annotated boxes of the image."""
        annotations = dataset_dict["annotations"]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4) * _scale(image)
        boxes = boxes.to(self.model.device)
        classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
        regions = self._regions(
            image, dataset_dict["image_id"], boxes, classes, torch.ones(len(boxes))
        )
        regions.ids = torch.tensor([a["id"] for a in annotations], dtype=torch.int64)
        return regions

    @torch.no_grad()
    def detected(self, image: ImageFeatures, image_id: int) -> ImageRegions:
        """The detections of the stock detector, in descending order of confidence."""
        stock = image.detections
        order = stock.scores.argsort(descending=True, stable=True)
        boxes = stock.pred_boxes.tensor[order]
        return self._regions(image, image_id, boxes, stock.pred_classes[order], stock.scores[order])

    @torch.no_grad()
    def query_aware(
        self,
        image: ImageFeatures,
        image_id: int,
        name: str,
        queries: Sequence[str],
        sent_ids: Sequence[int],
    ) -> ImageRegions:
        """The proposals of a VL-NMS for each query.

        Args:
            image: features of the image.
            image_id: its id in the data set.
            name: of the VL-NMS.
            queries: Q strings.
            sent_ids: their ids.
        """
        head = self.models[name].roi_heads
        # The steps of `score_queries`, with the text encoded only once: all captions of a split
        # may be scored on every image, and encoding them would take most of the time.
        with head.vlnms.autocast():
            [visual] = head.encode_candidates([image.candidates])
            text = self._encode_queries(name, list(queries))
        result = head.score_image(image.candidates, image.image_size, visual, text)
        distinct = image.candidates[result.distinct]
        regions = self._regions(image, image_id, result.boxes, distinct.classes, distinct.scores)
        regions.sent_ids = torch.tensor(sent_ids, dtype=torch.int64)
        regions.kept, regions.kept_scores = _per_query(result, len(queries))
        return regions

    def _encode_queries(self, name: str, queries: list[str]) -> TextFeatures:
        encoded_queries, text = self._encoded.get(name, (None, None))
        if encoded_queries != queries:
            [text] = self.models[name].roi_heads.vlnms.encode_queries([queries])
            self._encoded[name] = queries, text
        return text

    @torch.no_grad()
    def _regions(
        self, image: ImageFeatures, image_id: int, boxes: Tensor, classes: Tensor, scores: Tensor
    ) -> ImageRegions:
        """Regions of boxes in pixels of the network's input."""
        head = self.model.roi_heads
        pooled = head.pool_boxes(image.maps, [Boxes(boxes)])
        deep = head.encode_pooled(self.encoder, pooled)
        cells = pooled.flatten(2)
        # Not `std`, which is undefined when there are no boxes.
        spread = (cells - cells.mean(2, keepdim=True)).square().mean(2).sqrt()
        features = torch.cat([deep, cells.mean(2), spread], dim=1)
        boxes = boxes.cpu() / _scale(image)
        return ImageRegions(
            image_id, image.output_size, boxes, classes.cpu(), scores.cpu(), features.half().cpu()
        )


def _scale(image: ImageFeatures) -> Tensor:
    """Factors from pixels of the image to pixels of the network's input, for xyxy: float [4]."""
    (height, width), (output_height, output_width) = image.image_size, image.output_size
    return torch.tensor([width / output_width, height / output_height] * 2)


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


def _per_query(result: QueryResult, num_queries: int) -> tuple[Tensor, Tensor]:
    """Which of the distinct boxes each query keeps, int64 [Q, K] padded with -1, and their fused
    scores, float32 [Q, K]."""
    position = torch.arange(len(result.distinct), device=result.distinct.device)[result.position]
    counts = result.query_index.cpu().bincount(minlength=num_queries).tolist()
    kept = pad_sequence(position.split(counts), batch_first=True, padding_value=-1)
    return kept.cpu(), pad_sequence(result.scores.split(counts), batch_first=True).cpu()


def read_configs(
    entries: Sequence[str],
    sources: Sequence[str],
    floor: float,
    top: int | None,
    opts: Sequence[str] = (),
) -> dict[str, CfgNode]:
    """The config of each VL-NMS by name.

    Args:
        entries: NAME=CONFIG for each VL-NMS.
        sources: the requested sources.
        floor: minimum fused score of the proposals; without effect where `top` is given.
        top: number of boxes of every image or query, whatever their score.
        opts: KEY VALUE pairs that change each config.

    Raises:
        ValueError: an entry is not NAME=CONFIG, or a source has no config.
    """
    configs = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals or name in (GROUND_TRUTH, DETECTOR):
            raise ValueError(f"--proposals {entry!r}: expected NAME=CONFIG, as vlnms_fc=fc.yaml")
        cfg = load_config(path, opts)
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
    refuse_foreign(*(regions_file(out, n, s) for n, each in missing.items() for s in each))
    extractor = RegionExtractor(configs)
    datasets = {name: registered_images(name) for name in missing}
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
            claim(regions_file(out, name, source))
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
    image: ImageFeatures,
    source: str,
    dataset_dict: dict,
    expressions: Sequence[dict],
) -> ImageRegions:
    """The boxes of an image from a source; of a VL-NMS, those for the expressions."""
    if source == GROUND_TRUTH:
        return extractor.annotated(image, dataset_dict)
    image_id = dataset_dict["image_id"]
    if source == DETECTOR:
        return extractor.detected(image, image_id)
    queries = [e["query"] for e in expressions]
    return extractor.query_aware(
        image, image_id, source, queries, [e["sent_id"] for e in expressions]
    )
