"""Writes networks that are to be timed on another device."""

from __future__ import annotations

from typing import Any

import torch

from engine.latency.runtimes import compressed_onnx
from engine.spaces.load import load_space
from engine.tasks import ExportProbeTask, task_from_json

Json = dict[str, Any]


def run_export_probe(payload: Json) -> None:
    """ExportProbeTask -> nothing: writes ARCHITECTURE.onnx.gz. UsageError if torch cannot export the network."""
    task = task_from_json(ExportProbeTask, payload)
    torch.set_num_threads(1)
    network = load_space(task.space).build(task.architecture.choices, task.classes, task.width)
    (task.out / f"{task.architecture}.onnx.gz").write_bytes(compressed_onnx(network, task.resolution))
