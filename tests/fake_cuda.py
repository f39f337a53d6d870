"""A simulated CUDA device: work on it is dispatched as on a GPU, but nothing is computed.

    with fake_cuda() as device: ...

Tensors on "cuda" are PyTorch's fake tensors, so the dispatcher, autograd, autocast and shape inference are real, and an
operation on tensors of two devices raises. Streams, graphs and Triton's launcher are stand-ins. A number that the host
reads from the device is 0 (True for a bool) and counted in `device.reads`. During a capture, or if
`torch.cuda.set_sync_debug_mode` forbids it, the read raises as on a GPU. Numerics, races and cuDNN's choices stay
untested. Use it in a separate process: `fake_context` changes the process permanently.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch._subclasses.fake_tensor as fakes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

MEMORY = 150 * 10**9  # bytes, about an H200's
FORBIDDEN = "called a synchronizing CUDA operation"
WAITS = {"aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2"}
COPIES = {"aten::_to_copy", "aten::copy_"}
# Entries of the virtual function table of at::CUDAHooksInterface, the same in torch 2.11 and 2.15.
HAS_PRIMARY_CONTEXT, CUDNN_KNOWS_BFLOAT16 = 4, 32


@dataclass(frozen=True)
class Call:
    """An aten operation below autograd with the bytes of each tensor that it read and returned, or a Triton kernel with
    the bytes of its arguments. It holds no tensors, because autograd clones a gradient with another reference."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass
class Device:
    """Everything that happened on the device. `launches` counts Triton kernels by (name, whether captured), `waits`
    lists (stream, stream it waits for), and `calls` collects operations while `recording`."""

    stream: Stream
    capturing: bool = False
    sync_mode: int = 0
    reads: int = 0
    captures: int = 0
    replays: int = 0
    recording: bool = False
    launches: Counter[tuple[str, bool]] = field(default_factory=Counter)
    waits: list[tuple[int, int]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def refuse_waiting(self, what: str) -> None:
        if self.capturing or self.sync_mode:
            raise RuntimeError(f"{FORBIDDEN}: {what}")


class Stream:
    """The part of torch.cuda.Stream that the engine uses."""

    of: Device
    numbers = itertools.count()

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.cuda_stream = next(self.numbers)
        self.device = torch.device("cuda", 0)

    def wait_stream(self, other: Stream) -> None:
        self.of.waits.append((self.cuda_stream, other.cuda_stream))

    def wait_event(self, event: Event) -> None:
        if event.stream is not None:
            self.wait_stream(event.stream)

    def synchronize(self) -> None:
        self.of.refuse_waiting("a stream is synchronized")


class Event:
    """The part of torch.cuda.Event that the engine uses."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or Stream.of.stream

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1.0

    def synchronize(self) -> None:
        Stream.of.refuse_waiting("an event is synchronized")


class Graph:
    """The part of torch.cuda.CUDAGraph that the engine uses."""

    captured = False

    def replay(self) -> None:
        assert self.captured, "replayed before its capture"
        Stream.of.replays += 1

    def reset(self) -> None:
        self.captured = False


class Watch(TorchDispatchMode):
    """Sees every operation below autograd, before the fake tensors do."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if name == "aten::_local_scalar_dense" and args[0].device.type == "cuda":
            return self.read(args[0])
        inputs = tensors((args, kwargs))
        if name in WAITS and any(tensor.device.type == "cuda" for tensor in inputs):
            self.device.refuse_waiting(name)
        fused = FUSED.get(name)
        out = fused(*args, **kwargs) if fused else func(*args, **kwargs)
        outputs = tensors(out)
        for tensor in outputs:
            if isinstance(tensor, FakeTensor):
                tensor.constant = None  # torch would really copy a known value to the device
        if name in COPIES and {tensor.device.type for tensor in inputs + outputs} == {"cpu", "cuda"}:
            self.device.refuse_waiting(name)
        if self.device.recording and name.startswith("aten::"):
            read, written = (tuple(tensor.nbytes for tensor in group) for group in (inputs, outputs))
            self.device.calls.append(Call(name, read, written))
        return out

    def read(self, tensor: Tensor) -> float:
        self.device.refuse_waiting("the host reads a number")
        self.device.reads += 1
        if tensor.dtype == torch.bool:
            return True
        return 0.0 if tensor.is_floating_point() else 0


def tensors(tree: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def fused_sgd(params: Any, grads: Any, momenta: Any, *, lr: Any, **_: Any) -> None:
    check_fused(params, [grads, momenta], lr)


def fused_adamw(params: Any, grads: Any, means: Any, squares: Any, _: Any, steps: Any, *, lr: Any, **__: Any) -> None:
    check_fused(params, [grads, means, squares], lr)
    if any((step.shape, step.dtype, step.device) != ((), torch.float32, params[0].device) for step in steps):
        raise RuntimeError("fused AdamW: the steps must be float32 numbers on the device")


def check_fused(params: Any, others: list[Any], lr: Any) -> None:
    """Checks a CUDA kernel's requirements, since fake tensors have no rule for it: one device and dtype, strides that
    agree in all dimensions of size other than 1, and a learning rate that is a number or on that device."""
    if isinstance(lr, Tensor) and lr.device != params[0].device:
        raise RuntimeError(f"the learning rate is on {lr.device}, the weights are on {params[0].device}")
    for first, *rest in zip(params, *filter(None, others), strict=True):
        for other in rest:
            same = (first.shape, first.dtype, first.device) == (other.shape, other.dtype, other.device)
            if not same or layout(first) != layout(other):
                raise RuntimeError(f"fused update: {first.shape} {layout(first)} against {other.shape} {layout(other)}")


FUSED = {"aten::_fused_sgd_": fused_sgd, "aten::_fused_adamw_": fused_adamw}


def layout(tensor: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions whose size is not 1."""
    return tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1)


@contextlib.contextmanager
def fake_cuda() -> Iterator[Device]:
    """Gives torch one CUDA device for the duration of the block."""
    fake_context()
    default = Stream()
    device = Stream.of = Device(default)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        # Before torch.cuda reports a device, because fake tensors would then initialise it.
        stack.enter_context(mode)
        stack.enter_context(Watch(device))
        for owner, replacements in (
            (fakes, {"init_gpu_context": lambda _: None, "init_cuda_context": lambda _: None}),
            (torch.cuda, cuda_functions(device, default)),
            (torch, host_functions(mode)),
            (nn.Module, {"_apply": apply}),
            (Tensor, {"pin_memory": lambda tensor, device=None: tensor.clone()}),
            (JITFunction, {"run": launcher(device)}),
        ):
            for name, value in replacements.items():
                stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield device


def cuda_functions(device: Device, default: Stream) -> dict[str, Any]:
    """Replacements for functions and classes of torch.cuda."""

    @contextlib.contextmanager
    def on_stream(stream: Stream | None) -> Iterator[None]:
        before, device.stream = device.stream, stream or device.stream
        try:
            yield
        finally:
            device.stream = before

    @contextlib.contextmanager
    def capture(graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Any:
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        assert not device.capturing
        with on_stream(stream):
            device.capturing = True
            try:
                yield
            finally:
                device.capturing = False
        graph.captured = True
        device.captures += 1

    def set_sync_debug_mode(mode: int | str) -> None:
        device.sync_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)  # type: ignore[call-overload]

    properties = types.SimpleNamespace(total_memory=MEMORY, name="fake", major=9, minor=0, multi_processor_count=132)
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "fake",
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: device.refuse_waiting("memory is freed"),
        "synchronize": lambda _=None: device.refuse_waiting("the device is synchronized"),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": on_stream,
        "current_stream": lambda _=None: device.stream,
        "default_stream": lambda _=None: default,
        "is_current_stream_capturing": lambda: device.capturing,
        "get_sync_debug_mode": lambda: device.sync_mode,
        "set_sync_debug_mode": set_sync_debug_mode,
        "get_rng_state": lambda _=None: RandomState(),
        "default_generators": (types.SimpleNamespace(manual_seed=lambda key: None),),
        "device": lambda _: contextlib.nullcontext(),
        "device_of": lambda _: contextlib.nullcontext(),
    }


def host_functions(mode: FakeTensorMode) -> dict[str, Any]:
    """Replacements for functions of torch that read or allocate real memory."""
    from_numpy, empty_like = torch.from_numpy, torch.empty_like
    return {
        "get_rng_state": lambda: RandomState(),
        "from_numpy": lambda array: mode.from_tensor(from_numpy(np.array(array))),
        "empty_like": lambda tensor, pin_memory=False, **options: empty_like(tensor, **options),
    }


class RandomState:
    """A generator's state, always the same because nothing is drawn."""

    def numpy(self) -> RandomState:
        return self

    def tobytes(self) -> bytes:
        return b"state"


def launcher(device: Device) -> Callable[..., None]:
    """A replacement for Triton's launcher: checks that every tensor is on the device, and counts the launch."""

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        for name, value in (*zip(kernel.arg_names, arguments, strict=False), *options.items()):
            if isinstance(value, Tensor) and value.device.type != "cuda":
                raise RuntimeError(f"{kernel.fn.__name__}: {name} is on {value.device}")
        device.launches[kernel.fn.__name__, device.capturing] += 1
        if device.recording:
            touched = tensors((arguments, options))
            device.calls.append(Call(f"triton::{kernel.fn.__name__}", tuple(t.nbytes for t in touched), ()))

    return run


def apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply that creates new Parameters, because fake tensors can be neither swapped nor set."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                module._parameters[name] = nn.Parameter(fn(parameter), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def fake_context() -> None:
    """Makes the CUDA backend answer two questions without a driver: whether a device has a context (no), which autograd
    asks before each backward pass, and whether cuDNN has bfloat16 convolutions (yes), which determines layouts."""
    if not KEPT:
        replace_hook(HAS_PRIMARY_CONTEXT, ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(no))
        replace_hook(CUDNN_KNOWS_BFLOAT16, ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(yes))


def no(*_: object) -> bool:
    return False


def yes(*_: object) -> bool:
    return True


KEPT: list[Any] = []  # ctypes callbacks, which C++ keeps calling


def replace_hook(entry: int, answer: Any) -> None:
    """Replaces an entry in the virtual function table of the CUDA backend's hooks."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    hooks = library["_ZN2at6detail12getCUDAHooksEv"]
    hooks.restype = ctypes.POINTER(ctypes.c_void_p)
    table = hooks()[0]
    assert table is not None
    place = table + entry * ctypes.sizeof(ctypes.c_void_p)
    page = place & ~(mmap.PAGESIZE - 1)
    writable = ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), 2 * mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
    assert writable == 0, "the table cannot be made writable"
    ctypes.cast(place, ctypes.POINTER(ctypes.c_void_p))[0] = ctypes.cast(answer, ctypes.c_void_p).value
    KEPT.append(answer)
