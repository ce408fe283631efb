import pytest
import torch
import torch.distributed as dist
from conftest import build, image_input
from detectron2.structures import Boxes, Instances
from torch.nn.parallel import DistributedDataParallel


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("relatedness", "fusion"), [("FC", "joint"), ("Trans", "joint"), ("Trans", "co_attention")]
)
def test_a_frozen_detector_trains_inside_distributed_data_parallel(
    config, head, relatedness, fusion, process_group
):
    """Queries pass the wrapper; no frozen parameter is waited for, and every other has a part."""
    cfg = config(head, relatedness)
    cfg.MODEL.VLNMS.TRANS.FUSION = fusion
    model = build(cfg)
    wrapped = DistributedDataParallel(model)
    wrapped.train()
    target = Instances((96, 128))
    target.gt_boxes = Boxes(torch.tensor([[10.0, 10, 60, 60]]))
    for _ in range(2):  # the second iteration fails if the first left parameters unused
        losses = wrapped([image_input(0, query=["red cup"], query_targets=[target])])
        sum(losses.values()).backward()
    assert not model.backbone.training
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".vlnms." in name), name
