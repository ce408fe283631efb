"""How query text reaches the ROI head under the stock `GeneralizedRCNN`, and freezing.

`GeneralizedRCNN.forward` passes images, features and proposals to its ROI heads, but not the
inputs. To get at these, a PyTorch module-registration hook detects when a VL-NMS head is assigned
to a parent module, and adds two hooks to that parent: a forward pre-hook, which reads the queries
from `batched_inputs`, and a forward hook, which discards them, even if the forward raised. Two
methods that Detectron2 calls without hooks do the same: `inference`, and that of
`GeneralizedRCNNWithTTA` for one image.

The hooks find the head through the module that they are called with, so copied and unpickled
models use their own head. The queries of a call are kept in context variables, not on the module,
so threads that share a model do not see each other's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from detectron2.modeling import ROI_HEADS_REGISTRY, GeneralizedRCNNWithTTA
from detectron2.modeling.meta_arch import PanopticFPN, ProposalNetwork, RetinaNet, SemanticSegmentor
from detectron2.structures import Instances
from fvcore.transforms import HFlipTransform
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..file_io import shown


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
        # The call in progress, else the innermost `use_queries`.
        return _innermost((*_given_queries.get(), *_forward_queries.get()), self, num_images)


def _innermost(entries: _Entries, head: TakesQueries, num_images: int) -> QueryBatch:
    """The batch of the last entry of this head; without one, images without queries."""
    get_batch = next((get for of, get in reversed(entries) if of is head), _no_queries)
    batch = get_batch(num_images)
    if len(batch.queries) != num_images:
        raise ValueError(
            f"queries for {len(batch.queries)} images were given but the batch has {num_images}; "
            "in use_queries pass one entry per image, or every_image=True"
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
        ValueError: the numbers of queries and of query targets differ, or the key is "queries".
    """
    queries, targets = [], []
    for i, image_input in enumerate(batched_inputs):
        if "queries" in image_input:
            raise ValueError(f'batched_inputs[{i}] has the key "queries"; expected "query"')
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


def as_query_list(query: object, where: str = "query") -> list[str]:
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
            raise TypeError(
                f"{where}[{j}] must be a string, got {type(text).__name__}: {shown(text)}"
            )
    return list(query)


def query_head(model: nn.Module) -> TakesQueries:
    """The VL-NMS head of a model; ValueError if it has none, as it would ignore queries."""
    head = next((m for m in model.modules() if isinstance(m, TakesQueries)), None)
    if head is None:
        raise ValueError(
            "the model has no VL-NMS head and takes no queries; set MODEL.ROI_HEADS.NAME to "
            "VLNMSHead, VLNMSRes5Head or VLNMSCascadeHead"
        )
    return head


@contextmanager
def use_queries(
    model: nn.Module,
    queries: str | Sequence[str | Sequence[str] | None],
    *,
    every_image: bool = False,
) -> Iterator[None]:
    """Give queries to a model whose inputs are made elsewhere, for example by `DefaultPredictor`::

        with use_queries(model, [["red cup", "left chair"], "a dog"]):
            outputs = model(batched_inputs)

    An input with a "query" uses that one, also if it is None. The queries apply to calls from the
    same thread only.

    Args:
        model: a model with a VL-NMS head, or a wrapper such as DistributedDataParallel around one.
        queries: per image a string, a list of strings, or None for the stock detector.
        every_image: `queries` is a string or list of strings for one image, and applies to every
            image of every batch (in test-time augmentation these are views of one image).

    Raises:
        ValueError: the model has no VL-NMS head.
        TypeError: a query is not a string.
    """
    head = query_head(model)
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
    """Forward pre-hook: read the queries of the inputs, else of `use_queries`."""
    head = _head_of(parent)
    if head is None:
        return
    before = _forward_queries.get()
    # Push a placeholder first: if reading raises, `_end_forward` still runs and pops an entry.
    _forward_queries.set((*before, (head, _no_queries)))
    batch = _queries_of(head, args[0] if args else kwargs.get("batched_inputs", ()))
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


def _queries_of(head: TakesQueries, batched_inputs: Sequence[dict]) -> QueryBatch:
    batch = read_queries(batched_inputs)
    for i, image_input in enumerate(batched_inputs):
        if "query" not in image_input:
            given = _innermost(_given_queries.get(), head, len(batched_inputs))
            batch.queries[i] = given.queries[i]
    return batch


# Methods that Detectron2 calls without hooks. They are set on the instance, as partial functions of
# it, so that other models stay as they are, and copies and pickles refer to themselves.


def _inference(model: nn.Module, *args, **kwargs):
    """`model.inference`, which reads the queries of its inputs."""
    try:
        _begin_forward(model, args, kwargs)
        return type(model).inference(model, *args, **kwargs)
    finally:
        _end_forward(model, args, kwargs, None)


def _inference_one_image(tta: GeneralizedRCNNWithTTA, image_input: dict) -> dict:
    """Test-time augmentation of an image, query by query: merging the views would mix queries.

    Of the fields of VL-NMS the output has `query_index`.
    """
    stock = type(tta)._inference_one_image
    [queries] = _queries_of(_head_of(tta.model), [image_input]).queries
    if queries is None:
        return stock(tta, image_input)
    results = []
    for i, query in enumerate(queries or [""]):
        instances = stock(tta, {**image_input, "query": query})["instances"]
        instances.query_index = torch.full_like(instances.pred_classes, i)
        results.append(instances if queries else instances[:0])
    return {"instances": Instances.cat(results)}


# Also "topright", "lt"; a word too many costs only the mirrored views.
_SIDES = re.compile(r"left|(?<!\bb)right|clock|\b(east|west|([lr]|lf?t|r[gh]*t)\b)", re.IGNORECASE)


def _augmented_inputs(tta: GeneralizedRCNNWithTTA, image_input: dict) -> tuple[list, list]:
    """The views of an image, with its query; without mirrored ones if that speaks of sides."""
    query = image_input.get("query")
    views, transforms = type(tta)._get_augmented_inputs(tta, image_input)
    flips = [any(isinstance(t, HFlipTransform) for t in each.transforms) for each in transforms]
    kept = [i for i, flip in enumerate(flips) if not (flip and _SIDES.search(query or ""))]
    if not kept:
        raise ValueError(f"all views are mirrored, but the query {shown(query)} speaks of sides")
    return [{**views[i], "query": query} for i in kept], [transforms[i] for i in kept]


def _refuse_queries(arch: type[nn.Module]) -> None:
    """Let an architecture without ROI heads refuse a config that names a VL-NMS head."""
    stock = arch.from_config.__func__

    @functools.wraps(stock)
    def from_config(cls, cfg, *args, **kwargs):
        name = cfg.MODEL.ROI_HEADS.NAME
        if name in ROI_HEADS_REGISTRY and issubclass(ROI_HEADS_REGISTRY.get(name), TakesQueries):
            raise ValueError(
                f"MODEL.ROI_HEADS.NAME is {shown(name)}, but MODEL.META_ARCHITECTURE "
                f"{cls.__name__!r} has no ROI heads and would ignore queries; use 'GeneralizedRCNN'"
            )
        return stock(cls, cfg, *args, **kwargs)

    arch.from_config = classmethod(from_config)


for _arch in (ProposalNetwork, RetinaNet, SemanticSegmentor):
    _refuse_queries(_arch)


def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Module-registration hook, called just before `parent.name = child`."""
    if isinstance(parent, GeneralizedRCNNWithTTA) and child is not None and _head_of(child):
        parent._inference_one_image = functools.partial(_inference_one_image, parent)
        parent._get_augmented_inputs = functools.partial(_augmented_inputs, parent)
    if not isinstance(child, TakesQueries):
        if child is not None and _begin_forward in parent._forward_pre_hooks.values():
            head = _head_of(parent)
            if head is not None and head.freeze_detector and parent._modules.get(name) is not head:
                child.requires_grad_(False)
        return
    if hasattr(parent, "inference"):
        parent.inference = functools.partial(_inference, parent)
    if not any(hook is _begin_forward for hook in parent._forward_pre_hooks.values()):
        parent.register_forward_pre_hook(_begin_forward, with_kwargs=True)
        parent.register_forward_pre_hook(_check_ground_truth, with_kwargs=True)
        parent.register_forward_hook(_end_forward, with_kwargs=True, always_call=True)
    if child.freeze_detector:  # what is registered later is frozen above
        for sibling in _siblings(parent, child):
            sibling.requires_grad_(False)


register_module_module_registration_hook(_on_registration)
