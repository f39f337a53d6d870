"""A network made ready to be timed, as each runtime would run it when deployed."""

from __future__ import annotations

import copy
import gzip
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn

from engine.config import Runtime
from engine.export.onnx_file import Logits, exported, onnx_program
from engine.latency.time_probes import Call, device_name, open_network, timed
from engine.training.student import place
from engine.trial import EnvironmentUnusable

SMALL_BYTES = 1024  # of a weight; smaller ones keep their values, which may be constants that a runtime folds
WARM_UP_CALLS = 3  # before a capture: cuDNN chooses algorithms


@dataclass(frozen=True)
class Conditions:
    """How networks are timed: `batch` images (3, resolution, resolution) of float32 at a time, in a runtime. Those of
    torch use `device`; onnxruntime uses one thread of the CPU."""

    runtime: Runtime
    resolution: int
    batch: int
    device: torch.device

    @property
    def device_name(self) -> str:
        on_gpu = self.device.type == "cuda" and self.runtime != "onnxruntime"
        return torch.cuda.get_device_name(self.device) if on_gpu else device_name()

    def ready(self, build: Callable[[], nn.Module]) -> Callable[[], Call]:
        """A function that makes the network of `build` ready for a round, see `time_in_rounds`. What takes long,
        exporting and compiling, is done once. Torch must have been set to one thread."""
        if self.runtime == "onnxruntime":
            content = compressed_onnx(build(), self.resolution)
            shape = (self.batch, 3, self.resolution, self.resolution)
            return lambda: open_network(gzip.decompress(content), shape)
        prepare = partial(self._in_torch, build)
        return cache(prepare) if self.runtime == "torch.compile" else prepare

    def _in_torch(self, build: Callable[[], nn.Module]) -> Call:
        network = Logits(place(build(), self.device)).eval()
        images = torch.zeros(self.batch, 3, self.resolution, self.resolution, device=self.device)
        images = images.to(memory_format=torch.channels_last)
        run = torch.compile(network, dynamic=False) if self.runtime == "torch.compile" else network

        @torch.inference_mode()
        def forward() -> object:
            return run(images)

        try:
            forward()  # compiles
            return timed_by_events(as_graph(forward)) if self.device.type == "cuda" else timed(forward)
        except RuntimeError as error:
            if self.runtime != "torch.compile":
                raise
            why = str(error).strip().splitlines()[0]
            raise EnvironmentUnusable(
                f"torch.compile fails here ({why}); install a C++ compiler, or use --latency torch or onnxruntime"
            ) from error


def as_graph(forward: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of `forward`, so that launching kernels takes no time; `forward` itself if it cannot
    be captured, because it reads values on the host."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            forward()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            forward()
    except RuntimeError:
        torch.cuda.synchronize()
        return forward
    return graph.replay


def timed_by_events(run: Callable[[], object]) -> Call:
    """A call of `run`, timed in milliseconds between two events on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def call() -> float:
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return call


def compressed_onnx(network: nn.Module, resolution: int) -> bytes:
    """The compressed content of a network's ONNX file with zeros for its weights, which take as long and little space.

    The weights are cleared after the export, or it would merge those that are equal.
    """
    network = copy.deepcopy(network).cpu()
    proto = onnx_program(exported(Logits(network).eval(), resolution)).model_proto
    for tensor in proto.graph.initializer:
        if tensor.data_type == tensor.FLOAT and len(tensor.raw_data) > SMALL_BYTES:
            tensor.raw_data = bytes(len(tensor.raw_data))
    return gzip.compress(proto.SerializeToString(), mtime=0)
