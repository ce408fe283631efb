"""How query text reaches the ROI head under the stock `GeneralizedRCNN`.

`GeneralizedRCNN.forward` hands its ROI heads images, features and proposals, not the inputs. So
PyTorch's module-registration hook tells us which module became the parent of one of our heads; a
forward pre-hook on that parent reads `batched_inputs` and puts the queries down at the head, and
a forward hook clears them again, also when the forward raised. Both hooks find the head through
the module that they are called with, hence copies and unpickled models use their own head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from detectron2.structures import Instances
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


@dataclass
class QueryBatch:
    """The queries of a batch.

    Attributes:
        queries: per image its query strings, or None for an image that the stock detector handles.
        targets: per image one `Instances` per query with `gt_boxes` (the foreground boxes of
            the query, in pixels of the network's input), where their classes are known
            `gt_classes` (int64, negative: not known), and, where some of them are pseudo ground
            truth that cannot be relied on, `gt_reliable` (bool); or None. Used in training.
    """

    queries: list[list[str] | None]
    targets: list[list[Instances] | None]

    @property
    def is_empty(self) -> bool:
        """True when no image has a query: the model is the stock detector then."""
        return all(queries is None for queries in self.queries)


class TakesQueries:
    """Mark of the ROI heads that queries are put down at.

    Attributes:
        query_batch: the queries of the parent's forward that is under way, else None.
        given_queries: those of `use_queries`, for calls that do not pass the parent's forward.
        freeze_detector: whether everything around the relatedness branch stays as it is.
    """

    query_batch: QueryBatch | None = None
    given_queries: Callable[[int], QueryBatch] | None = None
    freeze_detector: bool = True

    def current_queries(self, num_images: int) -> QueryBatch:
        """The queries of the batch at hand.

        Raises:
            ValueError: they are for another number of images.
        """
        if self.query_batch is not None:
            batch = self.query_batch
        elif self.given_queries is not None:
            batch = self.given_queries(num_images)
        else:
            batch = QueryBatch([None] * num_images, [None] * num_images)
        if len(batch.queries) != num_images:
            raise ValueError(
                f"queries for {len(batch.queries)} images were given but the batch has "
                f"{num_images}; in use_queries pass one entry per image, or every_image=True"
            )
        return batch


def read_queries(batched_inputs: Sequence[dict]) -> QueryBatch:
    """The queries in Detectron2's model inputs.

    `batched_inputs[i]["query"]` is a string or a list of strings, `["query_targets"]` (training)
    a list of `Instances`, one per query.

    Raises:
        TypeError: a query is not a string.
        ValueError: the numbers of queries and of query targets differ.
    """
    queries, targets = [], []
    for i, image_input in enumerate(batched_inputs):
        query, target = image_input.get("query"), image_input.get("query_targets")
        where = f'batched_inputs[{i}]["query"]'
        if "file_name" in image_input:
            where += f" ({image_input['file_name']})"
        query = None if query is None else as_query_list(query, where)
        if target is not None and len(target) != len(query or []):
            raise ValueError(
                f"{where} has {len(query or [])} queries but query_targets has {len(target)} "
                "entries; give one Instances with gt_boxes per query"
            )
        queries.append(query)
        targets.append(target)
    return QueryBatch(queries, targets)


def as_query_list(query: str | Sequence[str], where: str = "query") -> list[str]:
    """A query string or a list of them as a list, checked.

    Raises:
        TypeError: something in it is not a string; the message says where.
    """
    if isinstance(query, str):
        return [query]
    if not isinstance(query, (list, tuple)):
        raise TypeError(
            f"{where} must be a string or a list of strings, got {type(query).__name__}"
        )
    for j, text in enumerate(query):
        if not isinstance(text, str):
            raise TypeError(f"{where}[{j}] must be a string, got {type(text).__name__}: {text!r}")
    return list(query)


@contextmanager
def use_queries(
    model: nn.Module,
    queries: str | Sequence[str | Sequence[str] | None],
    *,
    every_image: bool = False,
) -> Iterator[None]:
    """Give queries to a model whose `inference` is called directly, which skips forward hooks.

    Test-time augmentation does so, and so do scripts that want raw outputs::

        with use_queries(model, [["red cup", "left chair"], "a dog"]):
            outputs = model.inference(batched_inputs)

    A call of the model itself inside the `with` still takes the queries of its own inputs.

    Args:
        model: a model with a VL-NMS head; wrappers such as DistributedDataParallel are looked into.
        queries: per image a string, a list of strings, or None for the stock detector.
        every_image: `queries` is one image's string or list of strings, used for every image of
            every batch (test-time augmentation: the batches are views of one image).

    Raises:
        ValueError: the model has no VL-NMS head.
        TypeError: a query is not a string.
    """
    head = next((m for m in model.modules() if isinstance(m, TakesQueries)), None)
    if head is None:
        raise ValueError(
            "the model has no VL-NMS head; set MODEL.ROI_HEADS.NAME to VLNMSHead, VLNMSRes5Head "
            "or VLNMSCascadeHead"
        )
    if every_image:
        shared = as_query_list(queries, "queries")
        given = partial(_repeat, shared)
    else:
        listed = [
            None if query is None else as_query_list(query, f"queries[{i}]")
            for i, query in enumerate(queries)
        ]
        given = partial(_as_batch, listed)
    previous, head.given_queries = head.given_queries, given
    try:
        yield
    finally:
        head.given_queries = previous


def _as_batch(queries: list[list[str] | None], num_images: int) -> QueryBatch:
    return QueryBatch(queries, [None] * len(queries))


def _repeat(queries: list[str], num_images: int) -> QueryBatch:
    return _as_batch([queries] * num_images, num_images)


def _head_of(parent: nn.Module) -> TakesQueries | None:
    return next((child for child in parent.children() if isinstance(child, TakesQueries)), None)


def _put_down_queries(parent: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of the head's parent."""
    head = _head_of(parent)
    if head is None:
        return
    batched_inputs = args[0] if args else kwargs.get("batched_inputs", ())
    head.query_batch = read_queries(batched_inputs)
    if parent.training and head.freeze_detector:
        # `model.train()` reaches these too; RPN would sample and give losses, batch norm move.
        for sibling in _siblings(parent, head):
            sibling.eval()


def _clear_queries(parent: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
    """Forward hook of the head's parent, called also when the forward raised."""
    head = _head_of(parent)
    if head is not None:
        head.query_batch = None


def _siblings(parent: nn.Module, head: TakesQueries) -> Iterator[nn.Module]:
    return (child for child in parent.children() if child is not head)


def _adopt(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Module-registration hook: `parent.name = child` is about to happen."""
    if not isinstance(child, TakesQueries):
        return
    if not any(hook is _put_down_queries for hook in parent._forward_pre_hooks.values()):
        parent.register_forward_pre_hook(_put_down_queries, with_kwargs=True)
        parent.register_forward_hook(_clear_queries, with_kwargs=True, always_call=True)
    if child.freeze_detector:
        for sibling in _siblings(parent, child):
            sibling.requires_grad_(False)


register_module_module_registration_hook(_adopt)
