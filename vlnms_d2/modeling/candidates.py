"""Candidates: the (proposal, class) pairs that the detector is not sure to be nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

# SPEC section 2: how far delta is lowered at a time where an image has no candidate above it.
DELTA_STEP = 0.005


@dataclass
class Candidates:
    """The N candidates of one image.

    Attributes:
        boxes: float [N, 4], class-specific refined boxes, xyxy in pixels of the network's input.
        scores: float [N], class confidence c.
        classes: int64 [N].
        proposal_index: int64 [N], the proposal that each comes from.
        pooled: float [N, ...], what the visual encoder makes features of; None before pooling.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    proposal_index: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: Tensor) -> Candidates:
        """The candidates at `index`, bool [N] or int64 [M]."""
        return Candidates(
            self.boxes[index],
            self.scores[index],
            self.classes[index],
            self.proposal_index[index],
            None if self.pooled is None else self.pooled[index],
        )

    def to(self, device: torch.device) -> Candidates:
        """The candidates on `device`."""
        fields = vars(self).items()
        return Candidates(**{k: None if v is None else v.to(device) for k, v in fields})


@torch.no_grad()
def select_candidates(
    boxes: Tensor,
    scores: Tensor,
    image_size: tuple[int, int],
    *,
    score_thresh: float,
    max_candidates: int,
) -> Candidates:
    """Select the (proposal, class) pairs with confidence above `score_thresh` (SPEC section 2).

    No NMS here. Where no pair is above the threshold, it is lowered in steps of 0.005 until one
    is, so that an image with proposals always has a candidate.

    Args:
        boxes: float [R, K * 4] or, class-agnostic, [R, 4]; xyxy in pixels, as Detectron2's
            `predict_boxes` gives them. Clipped to the image here.
        scores: float [R, K + 1], class probabilities, background last.
        image_size: (height, width) in pixels.
        score_thresh: delta.
        max_candidates: of more candidates only those of highest confidence stay.

    Returns:
        Candidates in the order of proposals, then classes, as stock Detectron2 goes through them.

    Raises:
        ValueError: `max_candidates` is below 1.
    """
    if max_candidates < 1:
        raise ValueError(f"MODEL.VLNMS.MAX_CANDIDATES is {max_candidates}, expected at least 1")
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    scores = torch.where(finite[:, None], scores[:, :-1], float("-inf"))
    if scores.numel() == 0 or not bool(finite.any()):
        nothing = torch.zeros(0, dtype=torch.int64, device=boxes.device)
        return Candidates(boxes.new_zeros(0, 4), scores.new_zeros(0), nothing, nothing)

    pairs = (scores > reachable_threshold(score_thresh, scores.max())).nonzero()
    confidence = scores[pairs[:, 0], pairs[:, 1]]
    if len(pairs) > max_candidates:
        # A stable sort, so that ties are cut the same way everywhere.
        best = confidence.argsort(descending=True, stable=True)[:max_candidates].sort().values
        pairs, confidence = pairs[best], confidence[best]
    proposal, category = pairs.unbind(1)

    per_class = boxes.view(len(boxes), -1, 4)
    column = torch.zeros_like(category) if per_class.shape[1] == 1 else category
    return Candidates(
        clip_boxes_to_image(per_class[proposal, column], image_size), confidence, category, proposal
    )


def reachable_threshold(score_thresh: float, best: Tensor) -> float:
    """`score_thresh`, lowered in steps of 0.005 until it is below the scalar `best`.

    Compared as tensors are: for Python, float32's 0.05 is above 0.05.
    """
    steps = 0
    while not best > score_thresh - steps * DELTA_STEP:
        steps += 1
    return score_thresh - steps * DELTA_STEP
