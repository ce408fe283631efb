"""The model on a pretend GPU: the CPU's results, no mixed devices, and few synchronisations. Where
there is a real one, its results too."""

import copy
import functools

import pretend_cuda
import pytest
import torch
from closeness import assert_instances_alike
from conftest import HEADS
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances
from pretend_cuda import CudaTensor, PretendCuda, on_cuda
from small_models import WORDS, build, image_input, stock_config, targets
from tiny_bert import save_model

from vlnms_d2.modeling.candidates import WaitFreePooler

CLOSE = 1e-4
VARIANTS = {
    "FC": ("FC",),
    "FC additive": ("FC", "MODEL.VLNMS.ATTENTION", "additive"),
    "Trans joint": ("Trans", "MODEL.VLNMS.TRANS.FUSION", "joint"),
    "Trans co_attention": ("Trans", "MODEL.VLNMS.TRANS.FUSION", "co_attention"),
    "Trans cross_attention": ("Trans", "MODEL.VLNMS.TRANS.FUSION", "cross_attention"),
    "Category": ("Category", "MODEL.VLNMS.CATEGORY.NAMES", "['cup','dog','cat','car','bus']"),
}
# Each relatedness module with one head, and each head with two of them.
CASES = [("VLNMSHead", variant) for variant in VARIANTS]
CASES += [(head, v) for head in HEADS if head != "VLNMSHead" for v in ("FC", "Trans joint")]
BERT = ("MODEL.VLNMS.TEXT_ENCODER", "BERT", "MODEL.VLNMS.BERT.EMBEDDINGS_ONLY")
QUERIES = [["a red cup", "", "dog"], ["the left dog of a cup", "red unknown"]]


@pytest.fixture(params=CASES, ids=" ".join)
def case(config, request):
    """The name of a head, and its model."""
    head, variant = request.param
    relatedness, *options = VARIANTS[variant]
    cfg = config(head, relatedness)
    cfg.merge_from_list([*options, "MODEL.VLNMS.OUTPUT_ATTENTION", True])
    return head, build(cfg)


def to_cpu(value):
    """The same result on the CPU."""
    if isinstance(value, Instances):
        fields = {name: to_cpu(field) for name, field in value.get_fields().items()}
        return Instances(value.image_size, **fields)
    if isinstance(value, Boxes):
        return Boxes(to_cpu(value.tensor))
    assert isinstance(getattr(value, "tensor", value), CudaTensor)  # the result is on the GPU
    return value.values if isinstance(value, CudaTensor) else to_cpu(value.tensor)


@torch.no_grad()
def answers(model, queries=(None, None)):
    inputs = [image_input(i, query=query) for i, query in enumerate(queries)]
    return [output["instances"] for output in model(inputs)]


@functools.cache
def syncs_of_stock(head):
    model = on_cuda(build(stock_config(HEADS[head])))
    with PretendCuda() as cuda:
        answers(model)
    return cuda.syncs.total()


def assert_few_syncs(cuda, head):
    """At most 6 an image beyond those of the stock detector."""
    assert cuda.syncs.total() - syncs_of_stock(head) <= 2 * 6, cuda.places


def assert_same_answers(model, head):
    expected = answers(model, QUERIES)
    with PretendCuda() as cuda:
        found = [to_cpu(instances) for instances in answers(on_cuda(model), QUERIES)]
    for ours, cpus in zip(found, expected, strict=True):
        assert len(cpus) > 2
        assert_instances_alike(ours, cpus, CLOSE)
    assert_few_syncs(cuda, head)


def test_inference_equals_the_cpus(case):
    head, model = case
    assert_same_answers(model, head)


def trained(model, backward=torch.Tensor.backward):
    """Losses, gradients and the weights after one step of training."""
    torch.manual_seed(0)  # dropout and sampling
    model.train()
    inputs = [
        image_input(i, query=queries, query_targets=targets(len(queries)))
        for i, queries in enumerate(QUERIES)
    ]
    losses = model(inputs)
    backward(sum(losses.values()))
    learning = {n: p for n, p in model.named_parameters() if p.grad is not None}
    gradients = {name + " gradient": p.grad for name, p in learning.items()}
    torch.optim.SGD(learning.values(), lr=0.1).step()
    return {**losses, **gradients, **learning}


def assert_trains_alike(model):
    expected = trained(copy.deepcopy(model))
    with PretendCuda():
        found = trained(on_cuda(model), pretend_cuda.backward)
    assert_same_training({name: tensor.values for name, tensor in found.items()}, expected, CLOSE)


def assert_same_training(found, expected, tolerance):
    assert found.keys() == expected.keys() and len(expected) > 10
    largest = max(v.abs().max().item() for n, v in expected.items() if n.endswith(" gradient"))
    for name, value in expected.items():
        # Before batch norm gradients nearly cancel, so the largest of all is the measure.
        scale = max(largest, value.abs().max().item())
        difference = (found[name].cpu() - value).detach().abs().max().item()
        assert difference <= tolerance * scale, f"{name}: {difference / scale:.1g}"


def test_a_training_step_equals_the_cpus(case):
    _, model = case
    if model.roi_heads.vlnms.relatedness.learns:
        assert_trains_alike(model)


@pytest.mark.parametrize("relatedness", ["FC", "Trans"])
@pytest.mark.parametrize("embeddings_only", [True, False])
def test_bert_equals_the_cpus(config, relatedness, embeddings_only, tmp_path):
    cfg = config("VLNMSHead", relatedness)
    cfg.merge_from_list([*BERT, embeddings_only])
    cfg.MODEL.VLNMS.BERT.NAME = save_model(tmp_path, max_position_embeddings=40)
    model = build(cfg)
    assert_same_answers(model, "VLNMSHead")
    assert_trains_alike(model)


@pytest.fixture
def real_gpu(monkeypatch):
    """Convolutions in full float32, as on the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device("cuda")


def test_a_real_gpu_gives_the_cpus_answers(real_gpu, case):
    _, model = case
    expected = answers(model, QUERIES)
    for found, cpus in zip(answers(model.to(real_gpu), QUERIES), expected, strict=True):
        assert found.pred_boxes.device.type == "cuda"
        assert_instances_alike(found.to("cpu"), cpus, CLOSE)


def test_a_real_gpu_trains_like_the_cpu(real_gpu, case):
    _, model = case
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # a GPU has random numbers of its own
    if model.roi_heads.vlnms.relatedness.learns:
        expected = trained(copy.deepcopy(model))
        # Other kernels: gradients differed by up to 2e-4 on an H200.
        assert_same_training(trained(model.to(real_gpu)), expected, 10 * CLOSE)


def test_mixing_devices_raises():
    with PretendCuda():
        ours, cpus = CudaTensor(torch.ones(3)), torch.ones(3)
        with pytest.raises(RuntimeError, match="found cuda:0 and cpu"):
            ours + cpus
        with pytest.raises(RuntimeError, match="found cuda:0 and cpu"):
            cpus[CudaTensor(torch.zeros(2, dtype=torch.int64))]
        assert (ours + 1).device.type == "cuda" and ours.cpu().device.type == "cpu"


@pytest.mark.parametrize("relatedness", ["FC", "Trans"])
def test_synchronisations_do_not_grow_with_the_queries(config, head, relatedness):
    model = on_cuda(build(config(head, relatedness)))
    model.roi_heads.vlnms.chunk_bytes = 1 << 16  # such that queries are scored in many chunks
    totals = []
    for count in (2, 40):
        texts = [f"{WORDS[i % 8]} {WORDS[i // 8 % 8]} {WORDS[i // 64]}" for i in range(count)]
        with PretendCuda() as cuda:
            answers(model, [texts, [*texts, ""]])
        assert_few_syncs(cuda, head)
        totals.append(cuda.syncs.total())
    # One more an image where boxes suppress one another in long chains.
    assert totals[1] <= totals[0] + 2


@pytest.mark.parametrize("levels", [1, 4])
def test_pooling_without_waiting_is_the_stock_poolers_to_the_bit(levels):
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32][:levels]
    stock = ROIPooler(output_size=7, scales=scales, sampling_ratio=0, pooler_type="ROIAlignV2")
    maps = [torch.randn(3, 5, int(256 * scale), int(320 * scale)) for scale in scales]
    corner, size = torch.rand(2, 40, 2) * 200
    xyxy = torch.cat([corner, corner + size * torch.linspace(0, 1, 40)[:, None]], dim=1)
    boxes = [Boxes(part) for part in xyxy.split([25, 0, 15])]
    expected = stock(maps, boxes)
    ours = copy.deepcopy(stock)
    WaitFreePooler.replace(ours)
    with PretendCuda() as cuda:
        found = ours([CudaTensor(m) for m in maps], [Boxes(CudaTensor(b.tensor)) for b in boxes])
    assert torch.equal(found.values, expected) and not cuda.syncs
    assert torch.equal(ours(maps, boxes), expected)
