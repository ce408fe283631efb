"""The work of an export on one block of images, as each process does it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import build_detection_test_loader
from torch.utils.data import SequentialSampler

from ..data import GroundingMapper
from ..export import ProposalFormat, QueryProposals
from ..export.records import read_records, write_record
from ..file_io import atomic_write, write_json
from .proposal_model import FoundProposals, ProposalModel
from .score_threshold import save_scores
from .shards import Shards

FOUND, SCORES, COUNTS = "found", "scores", "counts"


@dataclass(frozen=True)
class ImageBlocks:
    """The images of a data set in blocks.

    Attributes:
        images: dicts with "expressions", as Detectron2's catalog has them.
        size: images of a block; the last one may have fewer.
    """

    images: Sequence[dict[str, Any]]
    size: int

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __getitem__(self, number: int) -> Sequence[dict[str, Any]]:
        return self.images[number * self.size : (number + 1) * self.size]

    def load(
        self, numbers: Sequence[int], mapper: GroundingMapper, num_workers: int
    ) -> Iterator[tuple[int, Iterator[tuple[dict[str, Any], dict[str, Any]]]]]:
        """The blocks' images, read from their files.

        Args:
            numbers: which blocks.
            mapper: from a dict to a model input.
            num_workers: processes that read ahead; 0 reads in this one.

        Returns:
            Per block its number and its images, each as a dict and a model input; a block's images
            have to be taken before the next block.
        """
        if not numbers:
            return
        own = [image for number in numbers for image in self[number]]
        loader = build_detection_test_loader(
            own, mapper=mapper, sampler=SequentialSampler(own), num_workers=num_workers
        )
        inputs = (image_input for [image_input] in loader)
        for number in numbers:
            yield number, zip(self[number], inputs, strict=False)


@dataclass(frozen=True)
class BlockWriter:
    """Turns what a model finds into shards of formats.

    Attributes:
        shards: where to.
        category_ids, category_names: by class.
    """

    shards: Shards
    category_ids: Sequence[int]
    category_names: Sequence[str]

    def find(
        self,
        number: int,
        images: Iterable[tuple[dict[str, Any], dict[str, Any]]],
        model: ProposalModel,
        with_scores: bool,
    ) -> None:
        """Answer the queries of a block and keep what is found, a record an image.

        Args:
            number: of the block.
            images: dicts and model inputs.
            model: that answers.
            with_scores: write what `threshold_for_mean` needs as well.
        """
        scores: list[np.ndarray] = []
        with atomic_write(self.shards.path(number, FOUND)) as file:
            for image, image_input in images:
                found = model(image_input, image_input["query"])
                scores += [found.scores[own] for own in found.queries()]
                write_record(file, {"image_id": image["image_id"]}, found.to_bytes())
            if with_scores:  # before the file is there, with which the block is found
                save_scores(self.shards.path(number, SCORES), scores)

    def write(
        self,
        number: int,
        images: Iterable[dict[str, Any]],
        formats: Sequence[ProposalFormat],
        threshold: float | None,
    ) -> None:
        """Write the shards of all formats of a block that is found, and last the counts.

        Args:
            number: of the block.
            images: its dicts.
            formats: to write.
            threshold: on s: what is above it stays, and the best; None leaves all.
        """
        counts = dict.fromkeys(("queries", "queries_without_proposals", "proposals"), 0)
        records = read_records([self.shards.path(number, FOUND)])
        with ExitStack() as stack:
            files = [
                stack.enter_context(atomic_write(self.shards.path(number, one.name)))
                for one in formats
            ]
            for image, (_, content) in zip(images, records, strict=True):
                found = FoundProposals.from_bytes(content)
                proposals = list(self._of_queries(image, found, threshold))
                for one, file in zip(formats, files, strict=True):
                    one.write(proposals, file)
                counts["queries"] += len(proposals)
                counts["queries_without_proposals"] += sum(not len(own) for own in proposals)
                counts["proposals"] += sum(map(len, proposals))
        write_json(self.shards.path(number, COUNTS), counts)

    def _of_queries(
        self, image: dict[str, Any], found: FoundProposals, threshold: float | None
    ) -> Iterator[QueryProposals]:
        for expression, own in zip(image["expressions"], found.queries(), strict=True):
            if threshold is not None:
                num_above = int((found.scores[own] > threshold).sum())
                own = slice(own.start, min(own.stop, own.start + max(1, num_above)))
            yield self._record(image, expression, found, own)

    def _record(
        self,
        image: dict[str, Any],
        expression: dict[str, Any],
        found: FoundProposals,
        own: slice,
    ) -> QueryProposals:
        corners, classes = found.corners[own], found.classes[own].tolist()
        masks = features = None
        if len(found.mask_of):
            masks = [found.mask(place) for place in range(own.start, own.stop)]
        if found.features.shape[1]:
            features = found.features[found.feature_of[own]]
        height, width = found.image_size.tolist()
        return QueryProposals(
            image_id=image["image_id"],
            query_id=expression["sent_id"],
            query=expression["query"],
            ref_id=expression["ref_id"],
            split=expression["split"],
            boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
            corners=corners,
            category_ids=np.array([self.category_ids[c] for c in classes], dtype=np.int64),
            category_names=[self.category_names[c] for c in classes],
            scores=found.scores[own],
            cls_scores=found.cls_scores[own],
            relatedness=found.relatedness[own],
            candidate_index=found.candidate_index[own],
            image_size=(height, width),
            image_suffix=Path(image["file_name"]).suffix,
            features=features,
            masks=masks,
        )
