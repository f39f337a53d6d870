"""Weights that other programs wrote: reading their files, and loading them into a network with another classifier."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.trial import UsageError

WRAPPERS = ("state_dict", "model")  # keys under which training programs save a state dict beside other things
NAMED = 5  # most tensors that an error names


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, or in a state dict that torch saved (.pt, .pth, .bin), on the CPU.

    Only tensors are read, no pickled objects. Raises UsageError if the file is missing or neither of the two.
    """
    if not path.is_file():
        raise UsageError(f"no weights file {path}; give an existing one")
    try:
        if path.suffix not in (".pt", ".pth", ".bin"):
            return dict(load_file(path))
        stored = torch.load(path, "cpu", weights_only=True)
        for key in WRAPPERS:
            if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
                stored = stored[key]
        if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
            raise TypeError("it is no mapping of names to tensors")
    except (SafetensorError, OSError, EOFError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{path} does not hold weights, or more than weights: {reason}") from error
    return dict(stored)


def load_except_classifier(
    network: nn.Module, stored: Mapping[str, Tensor], classifier: Collection[str], source: str
) -> None:
    """Loads a state dict, without those tensors of the classifier that have another shape or are missing.

    Raises UsageError, naming tensors, if anything else is missing, has another shape, or does not belong to the
    network. Counters of BatchNorm may be missing.
    """
    own = network.state_dict()
    fitting = {name: value for name, value in stored.items() if name in own and value.shape == own[name].shape}
    optional = {*classifier, *(name for name in own if name.endswith("num_batches_tracked"))}
    wrong = [
        f"{name} is {tuple(stored[name].shape)} there and {tuple(own[name].shape)} in the network"
        if name in stored
        else f"{name} is missing"
        for name in own
        if name not in fitting and name not in optional
    ]
    wrong += [f"{name} does not belong to the network" for name in stored if name not in own]
    if wrong:
        more = f", and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise UsageError(f"{source} does not hold weights of this network: {'; '.join(wrong[:NAMED])}{more}")
    network.load_state_dict(fitting, strict=False)
