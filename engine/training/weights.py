"""Weights files, written to a temporary file and moved into place, so that a reader never sees half a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from engine.networks.state_dict import read_state_dict
from engine.spaces.load import load_space
from engine.training.student import status_of
from engine.trial import EnvironmentUnusable, Trial, UsageError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path that replaces `path` if the block succeeds, and is removed if it fails. The file is synced to
    disk first, because the journal may name it, and power may fail.

    Raises EnvironmentUnusable if it cannot be written. The libraries have no exception of their own for a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # that of any new file here; safetensors makes files for their owner alone
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(path)
        with contextlib.suppress(OSError):  # not every file system can sync a folder
            _sync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        if status_of(error) == "oom":
            raise
        raise EnvironmentUnusable(f"cannot write {path} ({error}); free space and run the command again") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_weights(path: Path, network: nn.Module, metadata: dict[str, str] | None = None) -> None:
    """The parameters and buffers of a network as a safetensors file, with `metadata` in its header."""
    # Copies, because safetensors refuses tensors that share memory, such as tied weights.
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in network.state_dict().items()}
    with atomic_file(path) as temporary:
        save_file(weights, temporary, metadata=metadata)


def load_weights(path: Path, network: nn.Module) -> None:
    """Loads a weights file, safetensors or a state dict that torch saved, into a network of the same shape.

    Raises UsageError if the file is missing, is neither of the two, or is for another network.
    """
    try:
        network.load_state_dict(read_state_dict(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{path} does not hold weights of this network: {reason}") from error


def load_network(path: Path, space: str, trial: Trial, classes: int) -> nn.Module:
    """The network of a trial in `space` with the weights in the file `path`. Raises UsageError like `load_weights`."""
    network = load_space(space).build(trial.architecture.choices, classes, trial.fidelity.width)
    load_weights(path, network)
    return network
