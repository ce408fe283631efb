"""The relatedness branch: everything that the plugin adds to a detector's weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from ..config import check_choice
from .relatedness import Relatedness, RelatednessOutput
from .text import TextEncoder, TextFeatures


class RelatednessBranch(nn.Module):
    """Text encoder, visual encoder and relatedness module.

    Args:
        visual_encoder: the branch's copy of the detector's head; None if pooled candidates are
            visual features already (`MODEL.VLNMS.VISUAL_ENCODER` other than "finetune").
        text_encoder: maps strings to word features.
        relatedness: maps box and word features to logits.
        refinement_encoder: a second copy of the detector's head, for the box refinement; None if
            there is no refinement, or if it uses the same features as the relatedness.
        chunk_bytes: limit on the temporary memory for scoring the queries of one image; see
            `score`.
        precision: "bfloat16", the precision in which the layers compute, or "float32" for that of
            the surrounding autocast, if there is one.
    """

    def __init__(
        self,
        visual_encoder: nn.Module | None,
        text_encoder: TextEncoder,
        relatedness: Relatedness,
        refinement_encoder: nn.Module | None = None,
        chunk_bytes: int = 256 << 20,
        precision: str = "float32",
    ):
        super().__init__()
        check_choice("PRECISION", precision, ("float32", "bfloat16"))
        self.visual_encoder = visual_encoder
        self.text_encoder = text_encoder
        self.relatedness = relatedness
        self.refinement_encoder = refinement_encoder
        self.chunk_bytes = chunk_bytes
        self.precision = precision

    def autocast(self) -> AbstractContextManager:
        """The autocast context of the branch's precision; for float32 the surrounding one, in which
        the detector computes the features."""
        if self.precision == "float32":
            return nullcontext()
        device = next(self.buffers(), next(self.parameters(), torch.empty(0))).device.type
        return torch.autocast(device, torch.bfloat16)

    def encode_queries(self, queries: list[list[str]]) -> list[TextFeatures]:
        """Encode the queries of several images; each distinct query is encoded once.

        Args:
            queries: the query strings of each image.

        Returns:
            One TextFeatures per image.
        """
        distinct = list(dict.fromkeys(query for image in queries for query in image))
        row = {query: i for i, query in enumerate(distinct)}
        features = self.text_encoder(distinct)  # [number of distinct queries, L, D]
        return [features[[row[query] for query in image]] for image in queries]

    def encode_boxes(
        self, pooled: list[Tensor], apply: Callable[[nn.Module, Tensor], Tensor]
    ) -> list[Tensor]:
        """Visual features of the pooled boxes of several images.

        Args:
            pooled: per image float [N, ...]. Without a visual encoder, [N, D], returned as it is.
            apply: applies an encoder to the pooled boxes of all images: float [sum of N, D].

        Returns:
            Per image float [N, D]. With a refinement encoder [N, 2 * D]: the features for the
            relatedness, then those for the box refinement.
        """
        if self.visual_encoder is None or not pooled:
            return pooled
        boxes = pooled[0] if len(pooled) == 1 else torch.cat(pooled)
        encoders = [self.visual_encoder]
        if self.refinement_encoder is not None:
            encoders.append(self.refinement_encoder)
        encoded = torch.cat([apply(encoder, boxes) for encoder in encoders], dim=1)
        return list(encoded.split([len(image) for image in pooled]))

    def score(
        self, visual: Tensor, locations: Tensor, text: TextFeatures, with_attention: bool = False
    ) -> tuple[Tensor, RelatednessOutput]:
        """Relatedness of every box to every query, at inference.

        The queries are scored in chunks, so that temporary memory stays below `chunk_bytes`
        whatever their number.

        For an empty query r = 1 and there is no box refinement, so that the fused score keeps the
        detector's order.

        Args:
            visual: float [N, D], box features of one image.
            locations: float [N, 5]; see `box_locations`.
            text: the image's Q queries.
            with_attention: see `Relatedness.forward`.

        Returns:
            r, float [Q, N], and the module's output. Empty queries are taken care of in r and in
            the output's `deltas`, not in its `logits`.
        """
        cost = self.relatedness.bytes_per_query(len(visual), text.mask.shape[1])
        # Tensors get two fifths; the rest is headroom for freed memory that the allocator keeps.
        step = max(1, self.chunk_bytes * 2 // 5 // max(1, cost))
        chunks = [text[i : i + step] for i in range(0, max(1, len(text)), step)]
        boxes = self.relatedness.encode_boxes(visual, locations)
        output = RelatednessOutput.cat(
            (self.relatedness(boxes, locations, chunk, with_attention) for chunk in chunks),
            len(text),
            text.mask.shape[1],
        )
        empty = ~text.mask.any(dim=1, keepdim=True)  # [Q, 1]
        if output.deltas is not None:
            output.deltas = output.deltas.masked_fill(empty[..., None], 0.0)
        return torch.where(empty, 1.0, output.logits.sigmoid()), output


def refine_boxes(
    boxes: Tensor, deltas: Tensor, image_size: tuple[int, int], box2box: Box2BoxTransform
) -> Tensor:
    """Apply each query's box refinement t (Sec. 3.2.2) to the candidates' boxes.

    A box stays exactly as it is if t is zero, or if t would move all of it out of the image:
    Detectron2 drops empty boxes, and it may be the query's only one.

    Args:
        boxes: float [N, 4], xyxy in pixels.
        deltas: float [Q, N, 4], t.
        image_size: (height, width) in pixels.
        box2box: the parameterisation of t, taken from the detector's box predictor.

    Returns:
        float [Q, N, 4], clipped to the image.
    """
    # Detectron2's transform takes several deltas per box side by side: [N, Q * 4].
    refined = box2box.apply_deltas(deltas.transpose(0, 1).flatten(1), boxes)
    refined = refined.unflatten(1, (len(deltas), 4)).transpose(0, 1)  # [Q, N, 4]
    refined = clip_boxes_to_image(refined, image_size)
    has_area = (refined[..., 2:] > refined[..., :2]).all(dim=-1)
    applies = has_area & deltas.any(dim=-1)
    return torch.where(applies[..., None], refined, boxes)
