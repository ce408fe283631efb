"""How a query-conditioned head trains and loads its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from .candidates import Candidates
from .queries import QueryBatch, TakesQueries
from .relatedness import box_locations


class TrainsBranch(TakesQueries):
    """The training half of `QueryConditionedMixin`, whose attributes and steps it uses."""

    def _forward_training(self, images, features, proposals, targets, batch):
        self.check_trainable(batch)
        losses = {}
        if not self.freeze_detector:
            _, losses = super().forward(images, features, proposals, targets)
        if any(batch.queries):
            with torch.no_grad(), self._detector_in_eval_mode():
                detections = self._detect(features, proposals)
            asked = [i for i, queries in enumerate(batch.queries) if queries]
            candidates = [self._select(detections, i, proposals[i].image_size) for i in asked]
            pool = partial(self._pool, features, detections, asked=asked)
            sizes = [proposals[i].image_size for i in asked]
            losses.update(self.query_losses(candidates, sizes, batch, pool))
        return proposals, losses

    def check_trainable(self, batch: QueryBatch) -> None:
        """Refuse a training batch that has nothing to learn from, or queries without targets.

        Raises:
            ValueError: saying what is missing.
        """
        # An image with an empty list of queries has nothing to learn from either.
        if self.freeze_detector and not any(batch.queries):
            raise ValueError(
                "MODEL.VLNMS.FREEZE_DETECTOR is True and no image of the batch has a query: there "
                'is nothing to train. Give batched_inputs[i]["query"] and ["query_targets"] '
                "(vlnms_d2.data does), or set FREEZE_DETECTOR to False to train the detector."
            )
        for i, (queries, targets) in enumerate(zip(batch.queries, batch.targets, strict=True)):
            if queries and targets is None:
                raise ValueError(
                    f'batched_inputs[{i}] has queries but no "query_targets"; training needs one '
                    "Instances with gt_boxes per query"
                )

    def query_losses(
        self,
        candidates: list[Candidates],
        image_sizes: list[tuple[int, int]],
        batch: QueryBatch,
        pool: Callable[[list[Candidates]], None] | None = None,
    ) -> dict[str, Tensor]:
        """The losses of the images that have queries; see `Criterion.losses`.

        Args:
            candidates, image_sizes: of those images.
            batch: queries and targets of all images.
            pool: gives candidates what is pooled for them, in place, after those that take part
                have been drawn; None where they have it.
        """
        asked = [i for i, queries in enumerate(batch.queries) if queries]
        drawn = [
            self.criterion.draw(found, batch.targets[i], self.vlnms.relatedness.compares_boxes)
            for i, found in zip(asked, candidates, strict=True)
        ]
        candidates = [own.candidates for own in drawn]
        if pool is not None:
            pool(candidates)
        with self.own_precision():
            visual = self.encode_candidates(candidates)
            text = self.vlnms.encode_queries([batch.queries[i] for i in asked])
            outputs = [
                self.vlnms.relatedness(box_features, box_locations(found.boxes, size), own)
                for box_features, found, size, own in zip(
                    visual, candidates, image_sizes, text, strict=True
                )
            ]
        return self.criterion.losses(outputs, drawn, self._last_predictor.box2box_transform)

    @contextmanager
    def _detector_in_eval_mode(self) -> Iterator[None]:
        """The head itself in eval mode: CascadeROIHeads asks `self.training` between stages."""
        was_training, self.training = self.training, False
        try:
            yield
        finally:
            self.training = was_training

    def train(self, mode: bool = True):
        super().train(mode)
        if self.freeze_detector:
            for child in self.children():
                if child is not self.vlnms:
                    child.eval()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Start the encoders from the detector's head unless the checkpoint has its own."""
        for name in ("visual_encoder", "refinement_encoder"):
            own = f"{prefix}vlnms.{name}."
            if getattr(self.vlnms, name) is None or any(k.startswith(own) for k in state_dict):
                continue
            source = f"{prefix}{self.visual_encoder_source}."
            for key in [k for k in state_dict if k.startswith(source)]:
                state_dict[own + key[len(source) :]] = state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
