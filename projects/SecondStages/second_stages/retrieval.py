"""A reference model for retrieval, stacked cross-attention between boxes and words (SCAN i-t AVG):
its training, and the comparison of all pairs of a split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vlnms_d2.modeling.text import BiGRU, TextFeatures, Vocabulary

from .optimisation import Schedule, optimise
from .store import ImageRegions

SCHEDULE = Schedule(epochs=20, images_per_batch=32, lr=2e-3, weight_decay=1e-4)
EASY_SHARE = 0.3  # of the training; the hardest negatives alone prevent learning at the start


class StackedCrossAttention(nn.Module):
    """The similarity of a caption and the boxes of an image.

    Source: SCAN (Lee et al. 2018), Sec. 3.1, image-text with average pooling: every box attends to
    the words, and the similarity is the mean over the boxes of the cosine of a box with the words
    that it attends to. Words are the mean of the two directions of a GRU.

    Args:
        vocabulary: vocabulary of the captions.
        feature_dim: dimension D of the box features.
        embed_dim: dimension of the word embeddings.
        joint_dim: dimension H of the joint space.
        max_words: captions are truncated to this length.
        smoothing: lambda_1, the inverse temperature of the attention.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        feature_dim: int,
        *,
        embed_dim: int = 128,
        joint_dim: int = 256,
        max_words: int = 40,
        smoothing: float = 4.0,
    ):
        super().__init__()
        self.text = BiGRU(
            vocabulary=vocabulary, embed_dim=embed_dim, hidden_dim=joint_dim, max_words=max_words
        )
        self.smoothing = smoothing
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("scale", torch.ones(feature_dim))
        self.project = nn.Linear(feature_dim, joint_dim)

    @torch.no_grad()
    def fit_scale(self, features: Tensor) -> None:
        """Standardise features as those of the training boxes, float [N, D]."""
        self.mean.copy_(features.mean(0))
        self.scale.copy_(features.std(0).clamp(min=1e-4))

    def encode_boxes(self, features: Tensor) -> Tensor:
        """Features float [..., D] in the joint space, of length 1: float [..., H]."""
        return F.normalize(self.project((features - self.mean) / self.scale), dim=-1)

    def encode_captions(self, captions: list[str]) -> TextFeatures:
        """Words of captions in the joint space, of length 1: [C, L, H]."""
        text = self.text(captions)
        forward, backward = text.words.chunk(2, dim=-1)
        return TextFeatures(F.normalize((forward + backward) / 2, dim=-1), text.mask)

    def forward(self, boxes: Tensor, mask: Tensor, text: TextFeatures) -> Tensor:
        """Compare every image with every caption.

        Args:
            boxes: float [I, N, H], encoded.
            mask: bool [I, N], False where there is padding.
            text: of C captions, encoded.

        Returns:
            Float [I, C].
        """
        # Words are normalised over the boxes, of which padding must be excluded.
        cosines = torch.einsum("inh,clh->icnl", boxes * mask[..., None], text.words)
        return _mean_over_boxes(self._box_cosines(cosines, text), mask[:, None, :])

    def compare_pairs(self, boxes: Tensor, mask: Tensor, text: TextFeatures) -> Tensor:
        """Compare each caption with different boxes.

        Args:
            boxes: float [..., C, N, H], encoded: the boxes of an image for each caption.
            mask: bool [..., C, N], False where there is padding.
            text: of the C captions, encoded.

        Returns:
            Float [..., C].
        """
        cosines = torch.einsum("...cnh,clh->...cnl", boxes * mask[..., None], text.words)
        return _mean_over_boxes(self._box_cosines(cosines, text), mask)

    def _box_cosines(self, cosines: Tensor, text: TextFeatures) -> Tensor:
        """The cosine of each box with the words that it attends to: float [..., C, N].

        Args:
            cosines: float [..., C, N, L], of boxes and words.
            text: of the C captions.
        """
        words = text.mask[:, None, :]
        # Eq. 1: negative cosines are dropped, then each word is normalised over the boxes.
        positive = F.normalize(cosines.clamp(min=0) * words, dim=-2)
        weights = (self.smoothing * positive).masked_fill(~words, float("-inf")).softmax(dim=-1)
        # The weights of a caption without words are NaN.
        weights = weights.nan_to_num()
        # The attended words are a sum w = sum_j a_j e_j: its product with the box and its length
        # follow from the cosines and from the Gram matrix of the words, without computing w.
        product = (weights * cosines).sum(-1)
        words_gram = text.words @ text.words.transpose(1, 2)
        squared = torch.einsum("...cnl,clm,...cnm->...cn", weights, words_gram, weights)
        return product / squared.clamp(min=1e-12).sqrt()


def _mean_over_boxes(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def triplet_loss(similarities: Tensor, hardest: bool = True, margin: float = 0.2) -> Tensor:
    """The triplet loss of a batch (SCAN, Sec. 3.2).

    Args:
        similarities: float [B, B], of images and captions; the diagonal has the matching pairs.
        hardest: use the hardest negatives in the batch; otherwise the mean of all.
        margin: minimum difference between the diagonal and the negatives.

    Returns:
        The sum over the batch, for both directions.
    """
    positive = similarities.diagonal()
    itself = torch.eye(len(similarities), dtype=torch.bool, device=similarities.device)
    by_image = (margin + similarities - positive[:, None]).clamp(min=0).masked_fill(itself, 0)
    by_caption = (margin + similarities - positive[None, :]).clamp(min=0).masked_fill(itself, 0)
    if hardest:
        return by_image.amax(1).sum() + by_caption.amax(0).sum()
    return (by_image.sum() + by_caption.sum()) / max(len(similarities) - 1, 1)


def build_cross_attention(
    dataset_dicts: Sequence[dict], images: Mapping[int, ImageRegions], seed: int
) -> StackedCrossAttention:
    """A model with random weights and the vocabulary of its training captions.

    Args:
        dataset_dicts: to train on.
        images: their boxes with features.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    vocabulary = Vocabulary.build(e["query"] for one in dataset_dicts for e in one["expressions"])
    first = next(iter(images.values()))
    model = StackedCrossAttention(vocabulary, first.features.shape[1])
    model.fit_scale(torch.cat([one.features for one in images.values()]).float())
    return model


def train_cross_attention(
    model: StackedCrossAttention,
    dataset_dicts: Sequence[dict],
    images: Mapping[int, ImageRegions],
    seed: int,
    schedule: Schedule = SCHEDULE,
    *,
    num_boxes: int | None = None,
) -> None:
    """Train the model, in place, to match the captions and the images of a batch.

    In each epoch every image occurs once, with one of its captions. The loss uses all negatives at
    first (`EASY_SHARE`), then the hardest ones. If the boxes depend on the caption, each pair of a
    batch has its own boxes, and a batch consists of images with proposals for the same captions.

    Args:
        model: with random weights.
        dataset_dicts: with captions.
        images: their boxes with features; of a VL-NMS those for the captions of a group of images.
        seed: seed of the order and the choice of captions.
        schedule: see `Schedule`.
        num_boxes: number of boxes of each image or pair, from the first; None for all.

    Raises:
        ValueError: an image has no boxes for its captions.
    """
    draws = torch.Generator().manual_seed(seed)

    def loss(index: list[int], done: float) -> Tensor:
        expressions = [dataset_dicts[i]["expressions"] for i in index]
        drawn = [one[int(torch.randint(len(one), (), generator=draws))] for one in expressions]
        text = model.encode_captions([one["query"] for one in drawn])
        regions = [images[dataset_dicts[i]["image_id"]] for i in index]
        rows = _rows_of([one["sent_id"] for one in drawn], regions[0])
        similarities = _compare(model, regions, text, rows, num_boxes)
        return triplet_loss(similarities, hardest=done >= EASY_SHARE)

    optimise(model, loss, _groups_by_captions(dataset_dicts, images), schedule, seed)


def _groups_by_captions(
    dataset_dicts: Sequence[dict], images: Mapping[int, ImageRegions]
) -> list[list[int]]:
    """The numbers of the images, grouped by the captions that their boxes are for."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(dataset_dicts):
        sent_ids = images[one["image_id"]].sent_ids
        caption_ids = () if sent_ids is None else tuple(sent_ids.tolist())
        image_captions = {e["sent_id"] for e in one["expressions"]}
        if sent_ids is not None and not image_captions <= set(caption_ids):
            raise ValueError(
                f"image {one['image_id']} has no boxes for its captions; extract them with "
                "--top N --group N"
            )
        groups.setdefault(caption_ids, []).append(i)
    return list(groups.values())


def _rows_of(sent_ids: Sequence[int], regions: ImageRegions) -> list[int]:
    """The indices of captions among those that the boxes of an image are for; empty if the boxes do
    not depend on captions."""
    if regions.sent_ids is None:
        return []
    row = {sent_id: k for k, sent_id in enumerate(regions.sent_ids.tolist())}
    return [row[sent_id] for sent_id in sent_ids]


def _compare(
    model: StackedCrossAttention,
    regions: Sequence[ImageRegions],
    text: TextFeatures,
    rows: Sequence[int] | slice,
    num_boxes: int | None,
) -> Tensor:
    """Compare I images with C captions, each pair on the boxes that it has: float [I, C].

    Args:
        model: the model.
        regions: boxes of the images; of a VL-NMS all for the same captions.
        text: of the captions, encoded.
        rows: the indices of the captions among those of the VL-NMS.
        num_boxes: number of boxes of each image or pair, from the first; None for all.
    """
    if regions[0].kept is None:
        boxes, mask = _pad([one.features[:num_boxes] for one in regions])
        return model(model.encode_boxes(boxes), mask, text)
    boxes, _ = _pad([one.features for one in regions])
    # [I, C, K] from the transposed lists, as these are padded in their first dimension.
    kept = [one.kept[rows, :num_boxes].T for one in regions]
    kept = pad_sequence(kept, batch_first=True, padding_value=-1).transpose(1, 2)
    image = torch.arange(len(regions))[:, None, None]
    chosen = model.encode_boxes(boxes)[image, kept.clamp(min=0)]
    return model.compare_pairs(chosen, kept >= 0, text)


@torch.no_grad()
def compare_all(
    model: StackedCrossAttention,
    dataset_dicts: Sequence[dict],
    images: Mapping[int, ImageRegions],
    num_boxes: int | None,
) -> Iterator[tuple[int, Tensor]]:
    """Compare every image with all captions of the data set.

    Args:
        model: trained.
        dataset_dicts: with captions.
        images: the boxes; of a VL-NMS those for each caption of the data set, in its order.
        num_boxes: number of boxes of each image or pair, from the first; None for all.

    Yields:
        Image id and similarities, float [C].

    Raises:
        ValueError: the boxes are for another number of captions.
    """
    model.eval()
    captions = [e["query"] for one in dataset_dicts for e in one["expressions"]]
    text = model.encode_captions(captions)
    for one in dataset_dicts:
        regions = images[one["image_id"]]
        if regions.kept is not None and len(regions.kept) != len(text):
            raise ValueError(
                f"image {regions.image_id} has boxes for {len(regions.kept)} captions, expected "
                f"{len(text)}; extract them with --top N"
            )
        yield one["image_id"], _compare(model, [regions], text, slice(None), num_boxes)[0]


def _pad(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Features [I, N, D] and mask [I, N] of images with different numbers of boxes."""
    lengths = torch.tensor([len(one) for one in features])
    padded = pad_sequence([one.float() for one in features], batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
