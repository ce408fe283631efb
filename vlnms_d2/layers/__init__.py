"""Tensor operations of query-aware proposals, in plain PyTorch (no Detectron2 import)."""

from torch import Tensor

from .nms import multi_query_nms

FUSION_MODES = ("product", "weighted_product", "weighted_sum")


def fuse_scores(
    cls_scores: Tensor, relatedness: Tensor, mode: str = "product", weight: float = 0.5
) -> Tensor:
    """Fuse classification confidence and relatedness of N boxes for Q queries (Sec. 3.2).

    Args:
        cls_scores: float [N], the detector's confidence c of each box, in [0, 1].
        relatedness: float [Q, N] (or [N] for a single query), r of each box to each query, in
            [0, 1].
        mode: ``"product"`` for ``s = r * c`` (the paper's), ``"weighted_product"`` for
            ``s = r ** weight * c ** (1 - weight)`` or ``"weighted_sum"`` for
            ``s = weight * r + (1 - weight) * c``.
        weight: share of the relatedness, in [0, 1]; unused by the product.

    Returns:
        float tensor of the shape of ``relatedness``: the fused score s.

    Raises:
        ValueError: unknown mode, weight outside [0, 1], or shapes that do not match.
    """
    if mode not in FUSION_MODES:
        raise ValueError(f"unknown fusion mode {mode!r}; known modes: {', '.join(FUSION_MODES)}")
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"the fusion weight must lie in [0, 1], got {weight}")
    if cls_scores.dim() != 1 or relatedness.dim() not in (1, 2):
        raise ValueError(
            "expected cls_scores [N] and relatedness [Q, N] or [N], got "
            f"{list(cls_scores.shape)} and {list(relatedness.shape)}"
        )
    # Broadcasting would silently use a single score for all N boxes.
    if relatedness.shape[-1] != cls_scores.shape[0]:
        raise ValueError(
            f"relatedness is for {relatedness.shape[-1]} boxes, "
            f"cls_scores for {cls_scores.shape[0]}"
        )
    if mode == "product":
        return relatedness * cls_scores
    if mode == "weighted_product":
        return relatedness**weight * cls_scores ** (1.0 - weight)
    return weight * relatedness + (1.0 - weight) * cls_scores
