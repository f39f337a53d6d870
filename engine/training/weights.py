"""Files of weights: written aside and moved into place, so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from engine.training.student import status_of
from engine.trial import EnvironmentUnusable, UsageError


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A place to write to that becomes `path` when the block ends well, and is removed when it does not. What is there
    then is on the disk, not only on its way: the journal may name it, and power may fail.

    Raises EnvironmentUnusable where it cannot be written: a full disk has no exception of its own in the libraries.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        with contextlib.suppress(OSError):  # not every file system has folders that can be synchronised
            _sync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        if status_of(error) == "oom":
            raise
        raise EnvironmentUnusable(f"{path} cannot be written ({error}); free space, then repeat the command") from error
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_weights(path: Path, network: nn.Module, metadata: dict[str, str] | None = None) -> None:
    """The parameters and buffers of a network as a safetensors file, with `metadata` in its header."""
    # Copies: safetensors refuses what shares memory, as tied weights do.
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in network.state_dict().items()}
    with aside(path) as partial:
        save_file(weights, partial, metadata=metadata)


def load_weights(path: Path, network: nn.Module) -> None:
    """Puts the weights of a file, safetensors or a state dict that torch saved, into a network of the same shape.

    Nothing but tensors is read. Raises UsageError where the file is missing, is neither, or is for another network.
    """
    if not path.is_file():
        raise UsageError(f"no file of weights {path}")
    try:
        stored = torch.load(path, "cpu", weights_only=True) if path.suffix in (".pt", ".pth") else load_file(path)
        network.load_state_dict(stored)
    except (SafetensorError, OSError, EOFError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{path} does not hold weights of this network: {reason}") from error
