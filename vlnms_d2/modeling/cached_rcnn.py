"""A `GeneralizedRCNN` whose frozen detector looks at each image once, however often it is shown.

While the relatedness branch learns, the detector does not: what it says of an image is the same
in every epoch, in every run and at every evaluation. It takes most of the time of a training step.
"""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..file_io import atomic_write
from .candidates import Candidates
from .query_conditioned import QueryConditionedMixin
from .relatedness import visual_encoder_name


@dataclass
class SeenImage:
    """What the frozen detector said of an image.

    Attributes:
        image_size: (height, width) in pixels of the network's input.
        candidates: all of them, pooled.
        stock: the detector's own result: `pred_boxes`, `scores`, `pred_classes`.
    """

    image_size: tuple[int, int]
    candidates: Candidates
    stock: Instances


@META_ARCH_REGISTRY.register()
class CachedRCNN(GeneralizedRCNN):
    """`GeneralizedRCNN` with a VL-NMS head, for training the branch and for evaluating it often.

    Give `MODEL.META_ARCHITECTURE: "CachedRCNN"` and a folder, `MODEL.VLNMS.CACHE_DIR`. Losses and
    results are those of `GeneralizedRCNN` on one image at a time, the weights have the same
    names. Images are told apart by their pixels, detectors by their settings and by their weights
    when the first image is seen or after the model's `load_state_dict`, so one folder serves any
    number of runs, also at the same time. A forward that gives masks or
    keypoints needs the feature maps and is not cached. The folder takes 4 bytes for each number
    of what is pooled: 3 MB an image for 250 candidates of RefShapes' detector, 15 MB for 300 of
    a full-size FPN; what a C4 head pools is too large for this.

    Args:
        cache_dir: the folder.
        settings: text of all settings that the detector's answer depends on.

    Raises:
        ValueError: `cache_dir` is empty, the head is none of VL-NMS, the detector is not frozen, or
            it takes its proposals from files.
    """

    @configurable
    def __init__(self, *, cache_dir: str, settings: str = "", **kwargs):
        super().__init__(**kwargs)
        if not cache_dir:
            raise ValueError(
                "MODEL.META_ARCHITECTURE is CachedRCNN but MODEL.VLNMS.CACHE_DIR is empty; give "
                "a folder with room for the cache"
            )
        head = self.roi_heads
        if not isinstance(head, QueryConditionedMixin) or not head.freeze_detector:
            raise ValueError(
                "CachedRCNN needs a VL-NMS head (MODEL.ROI_HEADS.NAME) on a frozen detector "
                "(MODEL.VLNMS.FREEZE_DETECTOR True)"
            )
        if self.proposal_generator is None:
            raise ValueError(
                "CachedRCNN needs a detector that makes its own proposals, but "
                "MODEL.PROPOSAL_GENERATOR.NAME is PrecomputedProposals; use GeneralizedRCNN"
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
        self.roi_heads.check_trainable(batch)
        asked = [x for x, queries in zip(batched_inputs, batch.queries, strict=True) if queries]
        seen = [self._see(x) for x in asked]
        return self.roi_heads.query_losses(
            [s.candidates for s in seen], [s.image_size for s in seen], batch
        )

    def inference(self, batched_inputs, detected_instances=None, do_postprocess=True):
        """See `GeneralizedRCNN.inference`."""
        head = self.roi_heads
        needs_maps = head.mask_on or getattr(head, "keypoint_on", False)
        if detected_instances is not None or needs_maps:
            return super().inference(batched_inputs, detected_instances, do_postprocess)
        batch = head.current_queries(len(batched_inputs))
        seen = [self._see(image_input) for image_input in batched_inputs]
        asked = [i for i, queries in enumerate(batch.queries) if queries is not None]
        answers = head.answer(
            [seen[i].candidates for i in asked],
            [seen[i].image_size for i in asked],
            [batch.queries[i] for i in asked],
        )
        results = [s.stock for s in seen]
        for i, answer in zip(asked, answers, strict=True):
            results[i] = answer.per_query(answer.distinct_instances(seen[i].image_size))
        if not do_postprocess:
            return results
        sizes = [s.image_size for s in seen]
        return GeneralizedRCNN._postprocess(results, batched_inputs, sizes)

    def _see(self, image_input: dict) -> SeenImage:
        """What the detector says of the image, from the folder or, the first time, from itself."""
        image = image_input["image"]
        path = self._detector_folder() / f"{_digest([image])}.pt"
        if not path.is_file():
            with atomic_write(path) as file:
                torch.save(self._look_at(image), file)
        try:
            # Mapped, so that of what is pooled only the candidates that take part are read.
            said = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            candidates = Candidates(**said["candidates"])
            stock = Instances(said["image_size"])
            stock.pred_boxes = Boxes(said["stock_boxes"])
            stock.scores, stock.pred_classes = said["stock_scores"], said["stock_classes"]
        except (RuntimeError, OSError, pickle.UnpicklingError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path} of MODEL.VLNMS.CACHE_DIR cannot be read ({error}); delete it and it is "
                "made anew"
            ) from error
        return SeenImage(said["image_size"], candidates.to(self.device), stock.to(self.device))

    @torch.no_grad()
    def _look_at(self, image: Tensor) -> dict:
        with torch.autocast(self.device.type, enabled=False):
            images = self.preprocess_image([{"image": image}])
            features = self.backbone(images.tensor)
            proposals, _ = self.proposal_generator(images, features, None)
            [candidates], [stock] = self.roi_heads.detect(features, proposals)
        return {
            "image_size": tuple(images.image_sizes[0]),
            "candidates": vars(candidates),
            "stock_boxes": stock.pred_boxes.tensor,
            "stock_scores": stock.scores,
            "stock_classes": stock.pred_classes,
        }

    def _detector_folder(self) -> Path:
        """The folder of this detector, made on first use after weights were loaded."""
        if self._folder is None:
            weights = self.state_dict()
            detector = [weights[k] for k in sorted(weights) if ".vlnms." not in k]
            self._folder = self.cache_dir / _digest(detector, self.settings)
            self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder


def _forget_folder(model: CachedRCNN, incompatible_keys: object) -> None:
    model._folder = None


def _detector_settings(cfg: CfgNode) -> str:
    """All settings that the detector's answer may depend on, as text."""
    model = cfg.MODEL.clone()
    model.defrost()
    model.WEIGHTS = model.DEVICE = model.META_ARCHITECTURE = ""
    vlnms = model.pop("VLNMS")
    own = {"candidates": vlnms.MAX_CANDIDATES, "visual_encoder": visual_encoder_name(cfg)}
    return f"{model}\n{own}\n{cfg.TEST.DETECTIONS_PER_IMAGE}\n{cfg.INPUT.FORMAT}"


def _digest(tensors: list[Tensor], text: str = "") -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
