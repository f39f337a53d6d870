"""Files of weights: written aside and moved into place, so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import nn


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A place to write to that becomes `path` when the block ends well, and is removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_weights(path: Path, network: nn.Module, metadata: dict[str, str] | None = None) -> None:
    """The parameters and buffers of a network as a safetensors file, with `metadata` in its header."""
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    with aside(path) as partial:
        save_file(weights, partial, metadata=metadata)
