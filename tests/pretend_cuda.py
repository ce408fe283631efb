"""A pretend GPU: tensors that say that they are on cuda:0 and compute on the CPU.

It tests what CUDA code does with devices on a machine that has none::

    with PretendCuda() as cuda:
        outputs = on_cuda(model)(inputs)
    cuda.syncs  # the operations that made the host wait for the device

An operation that mixes devices raises, as on a GPU. Kernels, streams and speed are not tested: the
results are those of the CPU's kernels. Two limits: a batch needs two images (of a single one
Detectron2 changes the shape in place, which a wrapper cannot follow), and cuDNN is switched off.
"""

from __future__ import annotations

import collections
import copy
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# Parameters of tests that run on a real GPU as well.
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
# Operations whose result, or its size, the host needs at once.
_WAITING = {
    "aten::_local_scalar_dense",
    "aten::_unique",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "torchvision::nms",
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}
# These take the lengths of the sequences on the CPU.
_TAKES_CPU_TENSORS = {"aten::_pack_padded_sequence"}


class CudaTensor(Tensor):
    """Says that it is on cuda:0; its values are in `values`, on the CPU."""

    @staticmethod
    def __new__(cls, values: Tensor) -> CudaTensor:
        """A tensor of the values, which are not copied."""
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=CUDA,
        )
        wrapper.values = values
        return wrapper

    def __repr__(self) -> str:
        return f"CudaTensor({self.values})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        """Only called where no mode is active, such as in the threads of autograd."""
        with PretendCuda.current or PretendCuda():
            return operation(*args, **(kwargs or {}))


class PretendCuda(TorchDispatchMode):
    """While active, `device="cuda"` gives a `CudaTensor`, and synchronisations are counted.

    Attributes:
        syncs: operation -> how often it made the host wait for the device.
        places: "file:line" of vlnms_d2 or else Detectron2 -> the same.
        operations: how many operations the device was given.
    """

    current: PretendCuda | None = None

    def __init__(self):
        super().__init__()
        torch._C._ensureCUDADeviceGuardSet()
        # As for FakeTensor: constants made from Python numbers stay on the CPU until they are used.
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self.syncs: collections.Counter[str] = collections.Counter()
        self.places: collections.Counter[str] = collections.Counter()
        self.operations = 0
        PretendCuda.current = self

    def __enter__(self):
        self._cudnn = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False
        # Beside a real GPU, attention would choose a kernel that only CUDA has.
        self._attention = sdpa_kernel(SDPBackend.MATH)
        self._attention.__enter__()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *exception):
        torch._C._set_only_lift_cpu_tensors(False)
        self._attention.__exit__(*exception)
        torch.backends.cudnn.enabled = self._cudnn
        return super().__exit__(*exception)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Run one operation on the CPU, and say where its result is."""
        kwargs, name = kwargs or {}, operation._schema.name
        on_cuda, on_cpu = [], []

        def values_of(x):
            if isinstance(x, CudaTensor):
                on_cuda.append(x)
                return x.values
            if isinstance(x, Tensor):
                on_cpu.append(x)
            return CPU if isinstance(x, torch.device) else x

        values = _map(values_of, args)
        named_values = {key: _map(values_of, value) for key, value in kwargs.items()}
        result_on_cuda = bool(on_cuda)
        self.operations += result_on_cuda
        if kwargs.get("device") is not None:
            result_on_cuda = torch.device(kwargs["device"]).type == "cuda"
            named_values["device"] = CPU
        if name == "aten::copy_":
            result_on_cuda = isinstance(args[0], CudaTensor)
        elif name != "aten::_to_copy" and on_cuda:
            _check_devices(name, args, on_cpu)
        if on_cuda and _waits(name, args, on_cuda, result_on_cuda):
            self.syncs[name] += 1
            self.places[_caller()] += 1
        result = _KERNELS.get(name, operation)(*values, **named_values)
        # An operation in place gives the tensor that it was given.
        given = {id(x.values): x for x in on_cuda}

        def wrap(value):
            if not isinstance(value, Tensor) or not result_on_cuda:
                return value
            same = given.get(id(value))
            return same if same is not None and same.shape == value.shape else CudaTensor(value)

        if name in _TAKES_CPU_TENSORS:
            return wrap(result[0]), *result[1:]
        return _map(wrap, result)


def on_cuda(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers are on the pretend GPU."""
    model = copy.deepcopy(model)
    moved: dict[int, nn.Parameter] = {}  # shared parameters stay shared
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in moved:
                values = CudaTensor(parameter.detach().clone())
                moved[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
            module._parameters[name] = moved.get(id(parameter))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else CudaTensor(buffer.clone())
    return model


def backward(loss: Tensor) -> None:
    """`loss.backward()`, which asks the driver for streams and so needs a GPU, node by node."""
    waits: collections.Counter = collections.Counter()  # node -> how many gradients are to come
    stack, seen = [loss.grad_fn], {loss.grad_fn}
    while stack:
        for child, _ in stack.pop().next_functions:
            waits[child] += 1
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    ready, gradients = [loss.grad_fn], collections.defaultdict(dict)
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    while ready:
        node = ready.pop()
        given = gradients.pop(node, {})
        if hasattr(node, "variable"):  # a leaf
            node.variable.grad = given.get(0)
            continue
        with torch.no_grad():
            results = node(*map(given.get, range(len(node._input_metadata))))
            results = results if isinstance(results, tuple) else (results,)
            for (child, i), result in zip(node.next_functions, results, strict=True):
                if child is not None and result is not None:
                    # The operands of an operation may have been broadcast.
                    result = result.sum_to_size(child._input_metadata[i].shape)
                    before = gradients[child].get(i)
                    gradients[child][i] = result if before is None else before + result
                waits[child] -= 1
                if child is not None and not waits[child]:
                    ready.append(child)


def _map(function, value):
    """Apply the function to each item of nested lists and tuples; pytrees are much slower."""
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, item) for item in value)
    return function(value)


def _check_devices(name: str, args: tuple, on_cpu: list[Tensor]) -> None:
    """Raise as PyTorch does if an operation with a CUDA tensor also has CPU tensors."""
    if name in _TAKES_CPU_TENSORS or name == "aten::_pad_packed_sequence":
        return
    if name in _INDEXING and isinstance(args[0], CudaTensor):
        return  # indices on the CPU are moved
    if any(x.dim() for x in on_cpu):
        shapes = [tuple(x.shape) for x in on_cpu]
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu "
            f"(those on the cpu have the shapes {shapes})"
        )


def _waits(name: str, args: tuple, on_cuda: list[Tensor], result_on_cuda: bool) -> bool:
    """Whether the host waits for the device in this operation."""
    if name in ("aten::_to_copy", "aten::copy_"):
        return not result_on_cuda
    if name == "aten::repeat_interleave":
        return True  # of the number of repeats, unless `output_size` is given
    if name in _INDEXING:
        return any(x.dtype == torch.bool for x in args[1] if isinstance(x, CudaTensor))
    return name in _WAITING


def _caller() -> str:
    """The line of vlnms_d2, or else of Detectron2, that the current operation comes from."""
    frame, detectron2 = sys._getframe(2), ""
    while frame is not None:
        path = frame.f_code.co_filename
        if "/vlnms_d2/" in path:
            return f"{path.split('/vlnms_d2/')[-1]}:{frame.f_lineno}"
        if "/detectron2/" in path and not detectron2:
            detectron2 = f"detectron2/{path.split('/detectron2/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return detectron2 or "elsewhere"


# --- kernels that PyTorch has for CUDA only --------------------------------------------------


def _gru_cell(input_gates, hidden_gates, state, input_bias=None, hidden_bias=None):
    """One step of a GRU: the new state, and what the backward pass needs."""
    if input_bias is not None:
        input_gates, hidden_gates = input_gates + input_bias, hidden_gates + hidden_bias
    i_r, i_z, i_n = input_gates.chunk(3, 1)
    h_r, h_z, h_n = hidden_gates.chunk(3, 1)
    r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
    n = torch.tanh(i_n + r * h_n)
    return n + z * (state - n), torch.cat([r, z, n, state, h_n], 1)


def _gru_cell_backward(grad, workspace, has_bias):
    r, z, n, state, h_n = workspace.chunk(5, 1)
    d_n = grad * (1 - z) * (1 - n * n)
    d_r, d_z = d_n * h_n * r * (1 - r), grad * (state - n) * z * (1 - z)
    gates = torch.cat([d_r, d_z, d_n], 1), torch.cat([d_r, d_z, d_n * r], 1)
    biases = tuple(x.sum(0) for x in gates) if has_bias else (None, None)
    return *gates, grad * z, *biases


_KERNELS = {
    "aten::_thnn_fused_gru_cell": _gru_cell,
    "aten::_thnn_fused_gru_cell_backward": _gru_cell_backward,
}
