"""A `GeneralizedRCNN` that runs its frozen detector once per image and caches the result on disk.

While the relatedness branch is trained, the detector is not: its output for an image is the same
in every epoch, in every run and at every evaluation, and takes most of the time of a training step.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..file_io import atomic_write
from .candidates import Candidates
from .feature_extraction import ImageFeatures, check_model, extract_features
from .relatedness import visual_encoder_name


@META_ARCH_REGISTRY.register()
class CachedRCNN(GeneralizedRCNN):
    """`GeneralizedRCNN` with a VL-NMS head, for training the branch and for evaluating it often.

    Set `MODEL.META_ARCHITECTURE: "CachedRCNN"` and a folder, `MODEL.VLNMS.CACHE_DIR`. Losses and
    results are those of `GeneralizedRCNN` with one image at a time, and weights have the same
    names. Images are identified by their pixels, detectors by their settings and by their weights
    (when the first image is read, or after the model's `load_state_dict`), so one folder serves
    any number of runs, also concurrent ones. A forward with masks or keypoints needs the feature
    maps and is not cached. The folder takes 4 bytes per number that is pooled: 3 MB an image for
    250 candidates of RefShapes' detector, 15 MB for 300 of a full-size FPN; what a C4 head pools
    is too large for this.

    Args:
        cache_dir: the folder.
        settings: text of all settings that the detector's output depends on.

    Raises:
        ValueError: `cache_dir` is empty, the head is not one of VL-NMS, the detector is not frozen,
            or its proposals come from files.
    """

    @configurable
    def __init__(self, *, cache_dir: str, settings: str = "", **kwargs):
        super().__init__(**kwargs)
        if not cache_dir:
            raise ValueError(
                "MODEL.META_ARCHITECTURE is CachedRCNN but MODEL.VLNMS.CACHE_DIR is empty; give "
                "a folder with room for the cache"
            )
        check_model(self, "the config")
        if not self.roi_heads.freeze_detector:
            raise ValueError(
                "MODEL.META_ARCHITECTURE is CachedRCNN, but the detector is not frozen: set "
                "MODEL.VLNMS.FREEZE_DETECTOR to True, or use GeneralizedRCNN"
            )
        self.cache_dir = Path(cache_dir)
        self.settings = settings
        self._folder: Path | None = None
        self.register_load_state_dict_post_hook(_forget_folder)

    @classmethod
    def from_config(cls, cfg: CfgNode):
        ret = super().from_config(cfg)
        ret.update(cache_dir=cfg.MODEL.VLNMS.CACHE_DIR, settings=_detector_settings(cfg))
        return ret

    def forward(self, batched_inputs: list[dict]):
        """See `GeneralizedRCNN.forward`."""
        if not self.training:
            return self.inference(batched_inputs)
        batch = self.roi_heads.current_queries(len(batched_inputs))
        batch.check_for_training(self.roi_heads.freeze_detector)
        queried = [x for x, queries in zip(batched_inputs, batch.queries, strict=True) if queries]
        images = [self.cached_features(image_input) for image_input in queried]
        return self.roi_heads.query_losses(
            [image.candidates for image in images], [image.image_size for image in images], batch
        )

    def inference(self, batched_inputs, detected_instances=None, do_postprocess=True):
        """See `GeneralizedRCNN.inference`."""
        head = self.roi_heads
        needs_maps = head.mask_on or getattr(head, "keypoint_on", False)
        if detected_instances is not None or needs_maps:
            return super().inference(batched_inputs, detected_instances, do_postprocess)
        batch = head.current_queries(len(batched_inputs))
        images = [self.cached_features(image_input) for image_input in batched_inputs]
        queried = [i for i, queries in enumerate(batch.queries) if queries is not None]
        query_results = head.score_queries(
            [images[i].candidates for i in queried],
            [images[i].image_size for i in queried],
            [batch.queries[i] for i in queried],
        )
        results = [image.detections for image in images]
        for i, result in zip(queried, query_results, strict=True):
            results[i] = result.per_query(result.distinct_instances(images[i].image_size))
        if not do_postprocess:
            return results
        sizes = [image.image_size for image in images]
        return GeneralizedRCNN._postprocess(results, batched_inputs, sizes)

    def cached_features(self, image_input: dict) -> ImageFeatures:
        """The detector's output for the image, from the folder or, the first time, computed."""
        minimum = self.roi_heads.criterion.min_candidates if self.training else 1
        name = _digest([image_input["image"]], f"{minimum}" if minimum > 1 else "")
        path = self._detector_folder() / f"{name}.pt"
        if not path.is_file():
            with torch.autocast(self.device.type, enabled=False):
                image = extract_features(self, image_input)
            with atomic_write(path) as file:
                torch.save(_to_dict(image), file)
        try:
            # Memory-mapped, so that only the pooled features of sampled candidates are read.
            image = _from_dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
        except (RuntimeError, OSError, pickle.UnpicklingError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path} of MODEL.VLNMS.CACHE_DIR cannot be read ({error}); delete it and it is "
                "computed again"
            ) from error
        image.candidates = image.candidates.to(self.device)
        image.detections = image.detections.to(self.device)
        return image

    def _detector_folder(self) -> Path:
        """The folder of this detector, created on first use after weights were loaded."""
        if self._folder is None:
            weights = self.state_dict()
            detector = [weights[k] for k in sorted(weights) if ".vlnms." not in k]
            self._folder = self.cache_dir / _digest(detector, self.settings)
            self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder


def _forget_folder(model: CachedRCNN, incompatible_keys: object) -> None:
    model._folder = None


def _to_dict(image: ImageFeatures) -> dict:
    detections = image.detections
    return {
        "image_size": tuple(image.image_size),
        "candidates": vars(image.candidates),
        "stock_boxes": detections.pred_boxes.tensor,
        "stock_scores": detections.scores,
        "stock_classes": detections.pred_classes,
    }


def _from_dict(content: dict) -> ImageFeatures:
    size = content["image_size"]
    detections = Instances(size)
    detections.pred_boxes = Boxes(content["stock_boxes"])
    detections.scores = content["stock_scores"]
    detections.pred_classes = content["stock_classes"]
    # The pixels do not tell the output size, which is that of each input.
    return ImageFeatures(size, size, Candidates(**content["candidates"]), detections)


def _detector_settings(cfg: CfgNode) -> str:
    """All settings that the detector's output may depend on, as text."""
    model = cfg.MODEL.clone()
    model.defrost()
    model.WEIGHTS = model.DEVICE = model.META_ARCHITECTURE = ""
    vlnms = model.pop("VLNMS")
    branch = {"candidates": vlnms.MAX_CANDIDATES, "visual_encoder": visual_encoder_name(cfg)}
    return f"{model}\n{branch}\n{cfg.TEST.DETECTIONS_PER_IMAGE}\n{cfg.INPUT.FORMAT}"


def _digest(tensors: list[Tensor], text: str = "") -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
