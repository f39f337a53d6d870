"""The model card of an exported architecture."""

from __future__ import annotations

from typing import Any

from engine.data.batches import shorter_side
from engine.tasks import ExportTask

Json = dict[str, Any]

WITH_MODEL_PY = """
```python
import torch
from model import load, preprocess

model = load()
pixels = torch.randint(0, 256, (1, 3, {resolution}, {resolution}))  # RGB
print(model(preprocess(pixels)).softmax(1))
```
"""

WITH_ONNX = """
```python
import json
import numpy as np
import onnxruntime
from PIL import {modules}

session = onnxruntime.InferenceSession("model.onnx")
facts = {{k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}}
{image}
pixels = (np.asarray(image, np.float32) / 255 - np.float32(facts["mean"])) / np.float32(facts["std"])
(logits,) = session.run(None, {{"images": pixels.transpose(2, 0, 1)[None]}})
print(facts["classes"][logits[0].argmax()])
```
"""

# The preprocessing of the loader (engine/data/loader.py): arrays are resized whole, files cropped to the centre.
WHOLE = """image = Image.open("image.png").convert("RGB")
image = image.resize(({resolution}, {resolution}), Image.Resampling.BILINEAR)"""
CENTRE = """image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")
scale = {shorter} / min(image.size)
image = image.resize([round(scale * length) for length in image.size], Image.Resampling.BILINEAR)
left, top = ((length - {resolution} + 1) // 2 for length in image.size)
image = image.crop((left, top, left + {resolution}, top + {resolution}))"""

FILES = {
    "weights.safetensors": "parameters and buffers",
    "model.py": "the network as readable code; needs only torch",
    "model.onnx": "ONNX, any batch size; input `images`, output `logits`; classes and normalisation in its metadata",
    "export.json": "costs, latencies and differences in this card, for programs; the SHA-256 of the checkpoint",
    "model.pt2": '`torch.export.load("model.pt2").module()`, any batch size',
}


def model_card(report: Json, task: ExportTask) -> str:
    """Markdown: the network, its data and training, its accuracy and latency, and how to use it.

    `report` comes from formats.write_formats; `task.card` holds the facts that the run knows.
    """
    facts, resolution, classes = task.card, task.resolution, task.normalisation.classes
    missing = {"model.py"} if report["no_model_py"] else set()
    rows = [
        ("architecture", f"`{report['architecture']}` of the space `{task.space}`"),
        ("input", f"(N, 3, {resolution}, {resolution}), RGB, normalised as below"),
        ("output", f"logits (N, {len(classes)}), one per class"),
        *_accuracies(facts),
        ("multiply-accumulates", f"{report['macs']:,}"),
        ("parameters", f"{report['params']:,}"),
        ("data", f"`{facts['data']}`: {facts['images']}".replace("|", "\\|")),
        ("training", facts["training"]),
        ("teacher", facts["distillation"]),
        *([("training in the search", facts["search_training"])] if facts["search_training"] else []),
    ]
    shorter = shorter_side(resolution)
    cropped = f"the centre of images whose shorter side was resized to {shorter} pixels" if facts["files"] else "images"
    latency = [f"| {name} | {ms} |" for name, ms in report["latency_ms"].items()]
    formats = [f"- `{name}`: {text}" for name, text in FILES.items() if name not in missing]
    checked = ", ".join(f"`{name}` {value:.1e}" for name, value in report["differences"].items())
    return "\n".join(
        [
            f"# {facts['title']}\n",
            "| | |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in rows),
            "\n## Files\n",
            *formats,
            *([f"- no `model.py`: {report['no_model_py']}"] if missing else []),
            f"\nLargest difference of a logit from the checkpoint, float32, batches of 1 and 3: {checked}.",
            "\n## Input\n",
            "Pixels in 0..1, minus the mean, divided by the standard deviation, for each channel:\n",
            f"- mean {', '.join(f'{value:.6g}' for value in task.normalisation.mean)}",
            f"- std {', '.join(f'{value:.6g}' for value in task.normalisation.std)}",
            f"\nAccuracies are on {cropped}, resized by DALI or torch, antialiased.",
            *(["\n## With model.py", WITH_MODEL_PY.format(resolution=resolution)] if not missing else []),
            "\n## With onnxruntime",
            with_onnx(resolution, facts["files"]),
            "## Latency\n",
            f"Milliseconds of a forward pass in float32 on {facts['machine']}; the minimum of three medians of ten.\n",
            "| format | ms |",
            "| --- | --- |",
            *latency,
            "\n## Classes\n",
            ", ".join(classes),
            "\n## Provenance\n",
            f"- run: `{facts['run']}`",
            f"- its command: `{facts['command']}`",
            f"- trained with: {_named(facts['trained_with'])}, on {facts['trained_on']}",
            f"- exported with: {_named(facts['versions'])}\n",
        ]
    )


def _accuracies(facts: Json) -> list[tuple[str, str]]:
    """Rows of accuracies: of these weights, and of those from the search if these were trained once more."""
    test = ("accuracy, test split", _percent(facts["test_accuracy"]))
    valid = ("accuracy, validation split", _percent(facts["valid_accuracy"]))
    if not facts["search_training"]:
        return [valid, test]
    before = f"{_percent(facts['valid_accuracy'])} validation, {_percent(facts['search_test_accuracy'])} test"
    return [test, ("accuracy after the training in the search", before)]


def with_onnx(resolution: int, files: bool) -> str:
    """The card's example for onnxruntime; `files`: the training data were image files, not arrays."""
    image = (CENTRE if files else WHOLE).format(resolution=resolution, shorter=shorter_side(resolution))
    return WITH_ONNX.format(image=image, modules="Image, ImageOps" if files else "Image")


def _named(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _percent(accuracy: float | None) -> str:
    return f"{100 * accuracy:.2f} %" if accuracy is not None else "not measured"
