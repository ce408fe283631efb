"""One experiment: a second stage is trained on one data set and tested on proposals of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.data import MetadataCatalog

from vlnms_d2.data.builtin import registered_images
from vlnms_d2.file_io import atomic_write, claim, refuse_foreign

from .evaluation import Split, evaluate_grounding, evaluate_retrieval
from .rec_training import build_matcher, train_matcher
from .retrieval import StackedCrossAttention, build_cross_attention, train_cross_attention
from .store import GROUND_TRUTH


@dataclass(frozen=True)
class Experiment:
    """What to train and test on, and where the results go.

    Attributes:
        cache: folder written by `tools/extract_second_stage.py`.
        train: name of the training set.
        test: names of the test sets; thresholds are chosen on the first.
        sources: of the boxes to test on.
        same_images: see `Split.load`.
        seed: of weights, order and dropout.
        out: folder of the weights, with the results in a folder for each source.
        eval_only: load the weights of an earlier run instead of training.
    """

    cache: Path
    train: str
    test: Sequence[str]
    sources: Sequence[str]
    same_images: Mapping[str, str]
    seed: int
    out: Path
    eval_only: bool = False

    def run_rec(self, phrases: Sequence[str], mean_proposals: float) -> None:
        """Train the matcher of referring expressions and evaluate it on every source.

        Args:
            phrases: names of data sets of phrases to ground, in addition to `test`.
            mean_proposals: per expression at the real operating point.
        """
        weights = self.out / "rec.pth"
        kinds = {"rec": self.test, "phrase_grounding": phrases}
        results = [
            self.out / source / f"{kind}_{name}.json"
            for source in self.sources
            for grounding, names in kinds.items()
            for kind in (grounding, "choices", "proposals")
            for name in names
        ]
        self._refuse_foreign(weights, *results)
        train = self._load(self.train, GROUND_TRUTH)
        num_classes = len(MetadataCatalog.get(self.train).thing_classes)
        matcher = build_matcher(train.dataset_dicts, train.images, num_classes, self.seed)
        if not self._restore(matcher, weights):
            train_matcher(matcher, train.dataset_dicts, train.images, self.seed)
            _save(matcher, weights)
        claim(*results)
        for names, are_phrases in ((self.test, False), (phrases, True)):
            for source in self.sources if names else ():
                evaluate_grounding(
                    matcher,
                    [self._load(name, source) for name in names],
                    source,
                    self.out / source,
                    mean_proposals=mean_proposals,
                    phrases=are_phrases,
                )

    def run_retrieval(
        self, num_boxes: int, from_annotations: bool, captions_per_image: int | None = None
    ) -> None:
        """Train the retrieval model and evaluate it on every source.

        Args:
            num_boxes: of an image, or of a pair of image and caption; annotated boxes are all used.
            from_annotations: train one model on annotated boxes; otherwise one for each source, on
                the boxes of that source.
            captions_per_image: see `RetrievalEvaluator`.
        """
        results = [
            self.out / source / f"retrieval_{name}.json"
            for source in self.sources
            for name in self.test
        ]
        folders = [self.out] if from_annotations else [self.out / one for one in self.sources]
        self._refuse_foreign(*(folder / "retrieval.pth" for folder in folders), *results)
        shared = self._retrieval_model(GROUND_TRUTH, self.out, None) if from_annotations else None
        for source in self.sources:
            limit = None if source == GROUND_TRUTH else num_boxes
            folder = self.out / source
            model = shared or self._retrieval_model(source, folder, limit)
            claim(*results)
            for name in self.test:
                split = self._load(name, source)
                evaluate_retrieval(model, split, folder, limit, captions_per_image)

    def _retrieval_model(
        self, source: str, folder: Path, num_boxes: int | None
    ) -> StackedCrossAttention:
        train = self._load(self.train, source)
        model = build_cross_attention(train.dataset_dicts, train.images, self.seed)
        weights = folder / "retrieval.pth"
        if not self._restore(model, weights):
            train_cross_attention(
                model, train.dataset_dicts, train.images, self.seed, num_boxes=num_boxes
            )
            _save(model, weights)
        return model

    def _load(self, name: str, source: str) -> Split:
        return Split.load(name, registered_images(name), self.cache, source, self.same_images)

    def _refuse_foreign(self, *outputs: Path) -> None:
        """As the function; weights that are only read are no output."""
        refuse_foreign(*(p for p in outputs if not (self.eval_only and p.suffix == ".pth")))

    def _restore(self, model: torch.nn.Module, weights: Path) -> bool:
        if self.eval_only:
            model.load_state_dict(torch.load(weights, weights_only=True))
        return self.eval_only


def _save(model: torch.nn.Module, weights: Path) -> None:
    claim(weights)
    with atomic_write(weights) as file:
        torch.save(model.state_dict(), file)
