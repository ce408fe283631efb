"""What all relatedness modules share: locations, outputs in parts, memory, building by name."""

import weakref

import pytest
import torch
from detectron2.config import get_cfg
from tiny_relatedness import (
    KINDS,
    TEXT,
    VISUAL,
    make,
    make_fc,
    make_locations,
    make_text,
    make_trans,
    make_visual,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlnms_d2 import add_vlnms_config
from vlnms_d2.modeling.relatedness import (
    FC,
    RelatednessOutput,
    Trans,
    box_locations,
    build_relatedness,
)

# --- locations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([10, 20, 30, 60], [0.05, 0.2, 0.15, 0.6, 0.04]),
        ([0, 0, 200, 100], [0, 0, 1, 1, 1]),
        ([150, 90, 200, 100], [0.75, 0.9, 1, 1, 0.025]),
        ([0, 50, 100, 50], [0, 0.5, 0.5, 0.5, 0]),
    ],
    ids=["inside", "whole image", "at the border", "flat"],
)
def test_locations_by_hand(box, expected):
    boxes = torch.tensor([box, [0, 0, 1, 1]], dtype=torch.float32)
    found = box_locations(boxes, image_size=(100, 200))
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float32))


def test_locations_of_no_box():
    assert box_locations(torch.zeros(0, 4), (100, 200)).shape == (0, 5)


def test_locations_keep_the_precision_and_leave_the_boxes_alone():
    boxes = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64)
    found = box_locations(boxes, (3, 7))
    assert found.dtype == torch.float64 and boxes.tolist() == [[1, 2, 3, 4]]
    assert found.tolist() == [[1 / 7, 2 / 3, 3 / 7, 4 / 3, (3 / 7 - 1 / 7) * (4 / 3 - 2 / 3)]]


# --- outputs in parts --------------------------------------------------------------------------


def random_output(num_queries: int, *attention: int) -> RelatednessOutput:
    """For three boxes; attention of the given shape per query."""
    return RelatednessOutput(
        logits=torch.randn(num_queries, 3),
        attention=torch.rand(num_queries, *attention),
        deltas=torch.randn(num_queries, 3, 4),
    )


@pytest.mark.parametrize("per_box", [[], [3]], ids=["one for all boxes", "per box"])
def test_cat_pads_attention_to_the_longest(per_box):
    parts = [random_output(q, *per_box, length) for q, length in [(2, 1), (1, 4), (3, 0), (0, 2)]]
    whole = RelatednessOutput.cat(iter(parts), 6, 4)
    assert whole.attention.shape == (6, *per_box, 4)
    first, second, third = whole.attention.split([2, 1, 3])
    assert torch.equal(first[..., :1], parts[0].attention) and not first[..., 1:].any()
    assert torch.equal(second, parts[1].attention) and not third.any()
    assert torch.equal(whole.logits, torch.cat([part.logits for part in parts]))
    assert torch.equal(whole.deltas, torch.cat([part.deltas for part in parts]))


@pytest.mark.parametrize("missing", ["attention", "deltas"])
def test_cat_leaves_out_what_the_parts_do_not_have(missing):
    parts = [random_output(2, 4), random_output(1, 4)]
    for part in parts:
        setattr(part, missing, None)
    whole = RelatednessOutput.cat(parts, 3, 4)
    assert whole.logits.shape == (3, 3)
    assert [name for name, value in vars(whole).items() if value is None] == [missing]


def test_cat_of_one_part_is_that_part():
    part = random_output(2, 3, 4)
    whole = RelatednessOutput.cat([part], 2, 4)
    for name, value in vars(part).items():
        assert torch.equal(getattr(whole, name), value), name


def test_cat_lets_go_of_each_part_before_the_next_is_made():
    """Small tensors left among large temporary ones keep the allocator from using their place."""
    made = []

    def make() -> RelatednessOutput:
        assert not any(part() is not None for part in made)
        part = random_output(2, 3, 4)
        made.extend(weakref.ref(value) for value in vars(part).values())
        return part

    whole = RelatednessOutput.cat((make() for _ in range(3)), 6, 4)
    assert len(made) == 9 and whole.logits.shape == (6, 3)


# --- memory ------------------------------------------------------------------------------------


class PeakMemory(TorchDispatchMode):
    """Adds up the tensors that are alive at a time; `peak` is the most, in bytes."""

    def __init__(self):
        super().__init__()
        self.sizes, self.users, self.peak = {}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in (x for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            # Views have the storage in common.
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            self.sizes[place] = storage.nbytes()
            self.users[place] = self.users.get(place, 0) + 1
            weakref.finalize(tensor, self._forget, place)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result

    def _forget(self, place: int) -> None:
        self.users[place] -= 1
        if not self.users[place]:
            del self.users[place], self.sizes[place]


@torch.no_grad()
def peak_memory(module, num_boxes: int, lengths: list[int]) -> int:
    inputs = make_visual(num_boxes), make_locations(num_boxes), make_text(*lengths)
    with PeakMemory() as memory:
        # The variable keeps the output alive.
        output = module(*inputs, with_attention=True)
    assert len(output.logits) == len(lengths)
    return memory.peak


@pytest.mark.parametrize("kind", list(KINDS))
def test_bytes_per_query_is_about_what_a_query_takes(kind):
    cls, options = KINDS[kind]
    wide = {"hidden_dim": 64, "ffn_dim": 256}  # as in the config: four times as wide
    module = make_fc(**options) if cls is FC else make_trans(**options, **wide)
    num_boxes, num_words = 40, 6
    few, many = (peak_memory(module, num_boxes, [num_words] * n) for n in (4, 12))
    taken = (many - few) / 8
    assert 0.5 < module.bytes_per_query(num_boxes, num_words) / taken < 2


@pytest.mark.parametrize("kind", list(KINDS))
def test_bytes_per_query_grows_with_the_boxes_and_where_each_sees_the_words_with_those(kind):
    bytes_per_query = make(kind).bytes_per_query
    assert bytes_per_query(0, 4) < bytes_per_query(3, 4) < bytes_per_query(30, 4)
    assert (bytes_per_query(3, 40) > bytes_per_query(3, 4)) == (
        "additive" in kind or "Trans" in kind
    )
    assert isinstance(bytes_per_query(3, 4), int)


# --- by name -----------------------------------------------------------------------------------


def config():
    cfg = get_cfg()
    add_vlnms_config(cfg)
    cfg.MODEL.VLNMS.FC.HIDDEN_DIM = cfg.MODEL.VLNMS.TRANS.HIDDEN_DIM = 24
    cfg.MODEL.VLNMS.TRANS.FFN_DIM = 8
    return cfg


@pytest.mark.parametrize("cls", [FC, Trans])
def test_the_config_names_the_module(cls):
    cfg = config()
    cfg.MODEL.VLNMS.RELATEDNESS = cls.__name__
    module = build_relatedness(cfg, visual_dim=VISUAL, text_dim=TEXT)
    assert type(module) is cls
    output = module(make_visual(3), make_locations(3), make_text(2, 1))
    assert output.logits.shape == (2, 3)


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    cfg = config()
    cfg.MODEL.VLNMS.RELATEDNESS = "Transformer"
    with pytest.raises(ValueError, match=r"RELATEDNESS is 'Transformer'.*FC, Portable, Trans"):
        build_relatedness(cfg, visual_dim=VISUAL, text_dim=TEXT)
