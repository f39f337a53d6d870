"""A network as an ONNX file, traced by torch.export."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor, nn

from engine.trial import UsageError, not_installed


class Logits(nn.Module):
    """A network of a space without its features: images (N, 3, R, R) to logits (N, classes)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)[0]
        return logits


def exported(model: Logits, resolution: int) -> torch.export.ExportedProgram:
    """The model traced by torch.export for any number of images; UsageError if torch cannot trace it."""
    example = (torch.zeros(2, 3, resolution, resolution),)
    try:
        return torch.export.export(model, example, dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    except Exception as error:
        raise UsageError(
            f"torch.export cannot trace this network ({str(error).splitlines()[0]}); write its forward without "
            "branches on values and without a fixed batch size"
        ) from error


def onnx_program(program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
    """The ONNX form of a traced model, from "images" (batch, 3, R, R) to "logits"."""
    try:
        import onnxruntime  # noqa: F401 (whoever writes a file runs it)
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise not_installed(f"ONNX needs {error.name}", "export") from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own code
        written = torch.onnx.export(
            program, dynamo=True, verbose=False, output_names=["logits"], dynamic_shapes={"images": {0: "batch"}}
        )
    assert written is not None
    return written
