"""How query text reaches the ROI head under the stock `GeneralizedRCNN`, and freezing.

`GeneralizedRCNN.forward` passes images, features and proposals to its ROI heads, but not the
inputs. To get at these, a PyTorch module-registration hook detects when a VL-NMS head is assigned
to a parent module, and adds two hooks to that parent: a forward pre-hook, which reads the queries
from `batched_inputs`, and a forward hook, which discards them, even if the forward raised.

The hooks find the head through the module that they are called with, so copied and unpickled
models use their own head. The queries of a call are kept in context variables, not on the module,
so threads that share a model do not see each other's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from detectron2.modeling.meta_arch import PanopticFPN
from detectron2.structures import Instances
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


@dataclass
class QueryBatch:
    """The queries of a batch.

    Attributes:
        queries: per image its query strings, or None for an image that the stock detector handles.
        targets: per image None, or one `Instances` per query; used in training. Its fields are
            `gt_boxes`, the foreground boxes of the query in pixels of the network's input, and
            optionally `gt_classes` (int64, negative if not known; without the field, none is) and
            `gt_reliable` (bool, False for unreliable pseudo ground truth; without the field, all
            boxes are reliable).
    """

    queries: list[list[str] | None]
    targets: list[list[Instances] | None]

    @staticmethod
    def without_targets(queries: list[list[str] | None]) -> QueryBatch:
        """A batch for inference."""
        return QueryBatch(queries, [None] * len(queries))

    @property
    def is_empty(self) -> bool:
        """Whether no image has a query, so that the model is the stock detector."""
        return all(queries is None for queries in self.queries)

    def check_for_training(self, freeze_detector: bool) -> None:
        """Reject a batch that has nothing to learn from, or queries without targets.

        Raises:
            ValueError: naming what is missing.
        """
        # An image with an empty list of queries has nothing to learn from either.
        if freeze_detector and not any(self.queries):
            raise ValueError(
                "MODEL.VLNMS.FREEZE_DETECTOR is True and no image of the batch has a query: there "
                'is nothing to train. Give batched_inputs[i]["query"] and ["query_targets"] '
                "(vlnms_d2.data does), or set FREEZE_DETECTOR to False to train the detector."
            )
        for i, (queries, targets) in enumerate(zip(self.queries, self.targets, strict=True)):
            if queries and targets is None:
                raise ValueError(
                    f'batched_inputs[{i}] has queries but no "query_targets"; training needs one '
                    "Instances with gt_boxes per query"
                )


class TakesQueries:
    """Base class of the ROI heads that the hooks of this module pass queries to.

    Attributes:
        freeze_detector: whether only the relatedness branch is trained.
    """

    freeze_detector: bool = True

    def current_queries(self, num_images: int) -> QueryBatch:
        """The queries of the call in progress.

        Raises:
            ValueError: they are for another number of images.
        """
        # For this head: the forward in progress, else the innermost `use_queries`.
        entries = (*_given_queries.get(), *_forward_queries.get())
        innermost_first = (get_batch for head, get_batch in reversed(entries) if head is self)
        batch = next(innermost_first, _no_queries)(num_images)
        if len(batch.queries) != num_images:
            raise ValueError(
                f"queries for {len(batch.queries)} images were given but the batch has "
                f"{num_images}; in use_queries pass one entry per image, or every_image=True"
            )
        return batch


def _no_queries(num_images: int) -> QueryBatch:
    return QueryBatch.without_targets([None] * num_images)


# Pairs of a head and a function from the number of images to a batch; the innermost call is last.
_Entries = tuple[tuple[TakesQueries, Callable[[int], QueryBatch]], ...]
_forward_queries: ContextVar[_Entries] = ContextVar("forward_queries", default=())
_given_queries: ContextVar[_Entries] = ContextVar("given_queries", default=())


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
    """A query string, or a list of them, as a checked list.

    Raises:
        TypeError: something in it is not a string; the message names it after `where`.
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

    A call of the model itself inside the `with` block still uses the queries in its inputs. The
    queries apply to calls from the same thread only.

    Args:
        model: a model with a VL-NMS head, or a wrapper such as DistributedDataParallel around one.
        queries: per image a string, a list of strings, or None for the stock detector.
        every_image: `queries` is a string or list of strings for one image, and applies to every
            image of every batch (in test-time augmentation these are views of one image).

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
        entry = (head, lambda num_images: QueryBatch.without_targets([shared] * num_images))
    else:
        batch = QueryBatch.without_targets(
            [
                None if query is None else as_query_list(query, f"queries[{i}]")
                for i, query in enumerate(queries)
            ]
        )
        entry = (head, lambda num_images: batch)
    before = _given_queries.get()
    _given_queries.set((*before, entry))
    try:
        yield
    finally:
        _given_queries.set(before)


# --- hooks on the parent of a head ---------------------------------------------------------------


def _head_of(parent: nn.Module) -> TakesQueries | None:
    return next((child for child in parent.children() if isinstance(child, TakesQueries)), None)


def _siblings(parent: nn.Module, head: TakesQueries) -> Iterator[nn.Module]:
    return (child for child in parent.children() if child is not head)


def _begin_forward(parent: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook: read the queries of the inputs."""
    head = _head_of(parent)
    if head is None:
        return
    before = _forward_queries.get()
    # Push a placeholder first: if reading raises, `_end_forward` still runs and pops an entry.
    _forward_queries.set((*before, (head, _no_queries)))
    batch = read_queries(args[0] if args else kwargs.get("batched_inputs", ()))
    _forward_queries.set((*before, (head, lambda num_images: batch)))
    if parent.training and head.freeze_detector:
        # `model.train()` put these into training mode: RPN would sample and return losses, and
        # batch norm would update its statistics.
        for sibling in _siblings(parent, head):
            sibling.eval()


def _check_ground_truth(parent: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook: in training, require the ground truth of a detector that learns, and give
    PanopticFPN, whose forward reads it, some for frozen parts that do not use it."""
    head = _head_of(parent)
    if head is None or not parent.training:
        return None
    batched_inputs = args[0] if args else kwargs.get("batched_inputs", ())
    keys = ("instances", "sem_seg") if isinstance(parent, PanopticFPN) else ("instances",)
    lacking = [key for key in keys if any(key not in each for each in batched_inputs)]
    if lacking and not head.freeze_detector:
        raise ValueError(
            f'batched_inputs lack "{lacking[0]}", from which the detector learns; give it as '
            "Detectron2's DatasetMapper does, or set MODEL.VLNMS.FREEZE_DETECTOR to True"
        )
    if not lacking or "sem_seg" not in keys:
        return None
    sizes = [tuple(each["image"].shape[-2:]) for each in batched_inputs]
    unused = [{"sem_seg": torch.zeros(size).long(), "instances": Instances(size)} for size in sizes]
    return ([x | y for x, y in zip(unused, batched_inputs, strict=True)],), {}


def _end_forward(parent: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
    """Forward hook, also called when the forward raised: discard the queries."""
    entries = _forward_queries.get()
    if entries and entries[-1][0] is _head_of(parent):
        _forward_queries.set(entries[:-1])


def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Module-registration hook, called just before `parent.name = child`."""
    if not isinstance(child, TakesQueries):
        if child is not None and _begin_forward in parent._forward_pre_hooks.values():
            head = _head_of(parent)
            if head is not None and head.freeze_detector and parent._modules.get(name) is not head:
                child.requires_grad_(False)
        return
    if not any(hook is _begin_forward for hook in parent._forward_pre_hooks.values()):
        parent.register_forward_pre_hook(_begin_forward, with_kwargs=True)
        parent.register_forward_pre_hook(_check_ground_truth, with_kwargs=True)
        parent.register_forward_hook(_end_forward, with_kwargs=True, always_call=True)
    if child.freeze_detector:  # what is registered later is frozen above
        for sibling in _siblings(parent, child):
            sibling.requires_grad_(False)


register_module_module_registration_hook(_on_registration)
