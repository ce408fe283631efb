"""Box refinement: the relatedness module's t applied to the candidates' boxes."""

from __future__ import annotations

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor
from torchvision.ops import clip_boxes_to_image


def refine_boxes(
    boxes: Tensor, deltas: Tensor, image_size: tuple[int, int], box2box: Box2BoxTransform
) -> Tensor:
    """The boxes of each query after its refinement.

    A refinement of zeros leaves a box as it is, to the bit, and so does one that would move
    all of it out of the image: Detectron2 drops empty boxes, and the query may have no other.

    Args:
        boxes: float [N, 4], xyxy in pixels.
        deltas: float [Q, N, 4], t.
        image_size: (height, width) in pixels.
        box2box: of the detector's box predictor, whose parameterisation t is in.

    Returns:
        float [Q, N, 4].
    """
    # Detectron2's transform takes several deltas per box side by side: [N, Q * 4].
    refined = box2box.apply_deltas(deltas.transpose(0, 1).flatten(1), boxes)
    refined = refined.unflatten(1, (len(deltas), 4)).transpose(0, 1)
    refined = clip_boxes_to_image(refined, image_size)
    some_area = (refined[..., 2:] > refined[..., :2]).all(dim=-1)
    applies = some_area & deltas.any(dim=-1)
    return torch.where(applies[..., None], refined, boxes)
