"""How many CUDA kernels a student's training step launches, and how many bytes they move, counted without a GPU.

    python -m bench.count_kernels [SPACE ...]

A step runs on the fake device of tests/fake_cuda.py, under bf16 autocast, at 32 pixels and batch 64. For each space it
trains the architecture with the median number of convolutions among 25 random ones. Each operation counts as the
kernels that PyTorch launches for it; their bytes are those of its inputs and outputs, once per kernel that needs them.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter

import numpy as np
import torch
from torch import nn

from engine.config import SearchConfig
from engine.spaces.load import load_space
from engine.training.student import Inputs, prepare, take_step
from tests.fake_cuda import Call, Device, fake_cuda

SPACES = ("mobilenetv2", "shufflenetv2", "nasbench201")
BATCH, RESOLUTION, CLASSES, DRAWN = 64, 32, 100, 25
# Operations that launch no kernel.
FREE = (
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "as_strided_", "detach", "empty", "empty_like",
    "empty_strided", "expand", "is_pinned", "new_empty", "new_empty_strided", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
)  # fmt: skip
# Tensors per launch of PyTorch's multi-tensor kernels, by their number of tensor lists.
TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48}
# BatchNorm in training: how often each of its kernels reads or writes the activation, forward and backward.
NORM, NORM_BACKWARD = (1, 0, 2), (2, 3)


def median_architecture(space: str) -> tuple[int, ...]:
    """The architecture with the median number of convolutions among DRAWN random ones."""
    found, rng = load_space(space), np.random.default_rng(0)
    drawn = [tuple(int(rng.integers(radix)) for radix in found.radices) for _ in range(DRAWN)]

    def convolutions(choices: tuple[int, ...]) -> int:
        with torch.device("meta"):
            return sum(isinstance(module, nn.Conv2d) for module in found.build(choices, CLASSES, 1.0).modules())

    return sorted(drawn, key=convolutions)[DRAWN // 2]


def step(space: str, choices: tuple[int, ...]) -> list[tuple[str, int]]:
    """(name, bytes) of every kernel of a student's second step; the first one also allocates."""
    with fake_cuda() as device:
        cuda = torch.device("cuda")
        example = torch.zeros(2, 3, RESOLUTION, RESOLUTION, device=cuda)
        network = load_space(space).build(choices, CLASSES, 1.0)
        student = prepare(network, None, SearchConfig(batch_size=BATCH), "none", example)
        images = torch.zeros(BATCH, 3, RESOLUTION, RESOLUTION, device=cuda, dtype=torch.bfloat16)
        labels, rate = torch.zeros(BATCH, dtype=torch.int64, device=cuda), torch.zeros((), device=cuda)
        inputs = Inputs(images.contiguous(memory_format=torch.channels_last), labels, None, rate)
        take_step(student, inputs)
        device.recording = True
        take_step(student, inputs)
        return kernels(device)


def kernels(device: Device) -> list[tuple[str, int]]:
    return [kernel for call in device.calls for kernel in kernels_of(call)]


def kernels_of(call: Call) -> list[tuple[str, int]]:
    """The kernels that PyTorch launches for an operation."""
    name, read, written = call.name.partition("::")[2], sum(call.inputs), sum(call.outputs)
    if name in FREE:
        return []
    if name in ("native_batch_norm", "native_batch_norm_backward"):
        passes = NORM_BACKWARD if "backward" in name else NORM
        return [("BatchNorm", times * call.inputs[0]) for times in passes]
    if name == "convolution_backward":
        return [("convolution", sum(call.inputs[:3]))] * len(call.outputs)  # gradients of input and weight
    if name == "convolution":
        return [(name, read + written)]
    if name.startswith(("_foreach", "_fused")):
        lists = 3 if name.startswith("_fused") else 2 if "copy" in name else 1
        launches = math.ceil(len(call.inputs) / lists / TENSORS_PER_LAUNCH[lists])
        return [(name, (read + written) // launches)] * launches
    return [(name, read + written)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spaces", nargs="*", default=SPACES)
    parser.add_argument("--by-name", action="store_true", help="list the kernels of each step, most frequent first")
    given = parser.parse_args()
    for space in given.spaces:
        choices = median_architecture(space)
        found = step(space, choices)
        total = sum(size for _, size in found)
        print(f"{space:14} {'-'.join(map(str, choices)):32} {len(found):5} kernels {total / 1e6:8.0f} MB")
        if given.by_name:
            for name, count in Counter(name for name, _ in found).most_common():
                print(f"    {name:36} {count:5} {sum(size for n, size in found if n == name) / 1e6:8.0f} MB")


if __name__ == "__main__":
    main()
