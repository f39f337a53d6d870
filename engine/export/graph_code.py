"""Writes a network that is a graph of plain modules (engine/networks/plain.py) as the source of an ordinary class."""

from __future__ import annotations

import re

from torch import fx, nn

from engine.export.standalone import NotSelfContained
from engine.networks.plain import Downsample, SamePad2d

OWN = (Downsample, SamePad2d)  # the only modules that are not torch's


def graph_class(network: fx.GraphModule, name: str) -> str:
    """The source of a class that makes the network: its modules in the order of use, and its forward.

    It needs `torch`, `Tensor`, `nn` and the classes of OWN. Raises NotSelfContained for what cannot be written so.
    """
    made = "\n".join(f"        self.{key} = {_made(module)}" for key, module in network.named_children())
    own = [
        f"        self.{key} = nn.Parameter(torch.empty({tuple(value.shape)}))"
        for key, value in network.named_parameters(recurse=False)
    ]
    return "\n".join(
        [
            f"class {name}(nn.Module):",
            '    """Images (N, 3, R, R) to (logits (N, classes), [stage features]); written from a traced network."""',
            "",
            "    def __init__(self) -> None:",
            "        super().__init__()",
            made,
            *own,
            "",
            "    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:",
            *_steps(network),
        ]
    )


def _made(module: nn.Module) -> str:
    """The call that makes a module, which for torch's layers is what they print."""
    if next(module.children(), None) is not None:
        raise NotSelfContained(f"a module of type {type(module).__name__} has modules of its own")
    if isinstance(module, OWN):
        return repr(module)
    if not type(module).__module__.startswith("torch.nn."):
        raise NotSelfContained(f"{type(module).__name__} is not one of torch's modules")
    return f"nn.{module!r}"


def _steps(network: fx.GraphModule) -> list[str]:
    """The lines of forward, without the clean-up that torch.fx adds to each."""
    code = network.graph.python_code("self").src
    body = code[code.index("def forward") :].splitlines()[1:]
    lines = [re.sub(r";  \w+( = \w+)* = None$", "", line).rstrip() for line in body if line.strip()]
    if any("fx_pytree" in line or "_operator" in line for line in lines):
        raise NotSelfContained("its graph calls functions outside of torch")
    return ["    " + line for line in lines]
