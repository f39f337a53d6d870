"""Classifies image files with a trained network: the weights of a run, or an exported model.onnx.

Images take the way of the validation and test images (`eval_batches`), so that a prediction is what `eval` counts.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.data.batches import Batches
from engine.data.dataset import Dataset, Split
from engine.data.image_files import ENDINGS, check, read_rgb
from engine.data.loader import eval_batches
from engine.latency.time_probes import open_session
from engine.tasks import InputFormat, Normalisation, PredictTask, task_from_json
from engine.training.student import place
from engine.training.weights import load_network
from engine.trial import UsageError, not_installed

Json = dict[str, Any]
Network = Callable[[Tensor], Tensor]  # images (N, 3, R, R) to logits (N, classes)
BATCH = 256  # as `eval` scores
THREADS = 1


def run_predict(payload: Json) -> Json:
    """PredictTask -> {"images": [{"file", "classes": [{"class", "probability"}, ...]}], "unreadable": {file: reason}}.

    Images are in the order of the task, those of a folder sorted. Raises UsageError if the network does not fit, or a
    folder has no image.
    """
    task = task_from_json(PredictTask, payload)
    if task.device == "cpu":
        torch.set_num_threads(1)
    network, inputs = _exported(task.network) if task.trial is None else _trained(task)
    files = list(_image_files(task.images))
    with tempfile.TemporaryDirectory(prefix="mfkd-") as scratch:
        read = _cropped if inputs.cropped else _whole
        splits, unreadable = read(files, inputs.resolution, Path(scratch))
        found: dict[int, list[Json]] = {}
        for rows, split in splits:
            probabilities = _probabilities(network, _batches(split, inputs, task)).numpy()
            top = [_top(each, inputs.normalisation.classes, task.top) for each in probabilities]
            found |= dict(zip(rows, top, strict=True))
    images = [{"file": files[row], "classes": found[row]} for row in sorted(found)]
    return {"images": images, "unreadable": {files[row]: why for row, why in unreadable.items()}}


def _trained(task: PredictTask) -> tuple[Network, InputFormat]:
    """The network of a trial, with its weights, on the device."""
    assert task.trial is not None
    assert task.inputs is not None
    network = load_network(task.network, task.space, task.trial, len(task.inputs.normalisation.classes))
    placed = place(network, torch.device(task.device)).eval()
    return lambda images: placed(images)[0], task.inputs


def _exported(path: Path) -> tuple[Network, InputFormat]:
    """The network in a model.onnx, which runs no code of the folder that it is in, and its input format."""
    try:
        session = open_session(str(path))
        facts = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
        mean, std = (tuple(facts[name]) for name in ("mean", "std"))
        known = Normalisation(tuple(facts["classes"]), mean, std)
        inputs = InputFormat(known, facts["resolution"], facts["shorter_side"] is not None)
    except ImportError as error:
        raise not_installed("predict needs onnxruntime for an export", "export") from error
    except Exception as error:  # onnxruntime has a type of its own for each way in which a file may be broken
        raise UsageError(
            f"{path} was not written by this version's export ({type(error).__name__}: {error}); export the run again"
        ) from error
    return lambda images: torch.from_numpy(session.run(None, {"images": images.contiguous().numpy()})[0]), inputs


def _image_files(paths: Sequence[Path]) -> Iterator[str]:
    """The files among paths, and the image files below the folders among them; hidden ones are passed over."""
    for path in paths:
        if not path.is_dir():
            yield str(path)
            continue
        below = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
        seen = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not seen:
            raise UsageError(f"the folder {path} has no image ({', '.join(ENDINGS)})")
        yield from map(str, seen)


# Which rows of the list of files a split has, and the split.
_Rows = list[tuple[list[int], Split]]


def _cropped(files: list[str], resolution: int, scratch: Path) -> tuple[_Rows, dict[int, str]]:
    """The files as a split of files, and why others cannot be read. Those that DALI cannot read are converted."""
    checked = check(files, scratch)
    rows = [row for row in range(len(files)) if row not in checked.broken]
    converted = {files[row]: png for row, png in checked.converted.items()}
    split = Split(np.zeros(len(rows), np.int64), None, tuple(os.path.abspath(files[row]) for row in rows), converted)
    return [(rows, split)] if rows else [], checked.broken


def _whole(files: list[str], resolution: int, scratch: Path) -> tuple[_Rows, dict[int, str]]:
    """The files as splits of arrays, one for each size, and why others cannot be read.

    The loader resizes squares, as it does the images of a data set. Others are squeezed to squares here.
    """
    sizes: dict[int, list[tuple[int, Image.Image]]] = defaultdict(list)
    unreadable: dict[int, str] = {}
    for row, file in enumerate(files):
        image = read_rgb(file)
        if isinstance(image, str):
            unreadable[row] = image
        else:
            if image.width != image.height:
                image = image.resize((resolution, resolution), Image.Resampling.BILINEAR)
            sizes[image.width].append((row, image))
    splits = []
    for images in sizes.values():
        pixels = np.stack([np.asarray(image) for _, image in images])
        splits.append(([row for row, _ in images], Split(np.zeros(len(images), np.int64), pixels, None)))
    return splits, unreadable


def _batches(split: Split, inputs: InputFormat, task: PredictTask) -> Batches:
    known, backend = inputs.normalisation, "dali" if inputs.cropped else task.data_backend
    data = Dataset("images", split, split, split, known.classes, known.mean, known.std, inputs.resolution, False)
    return eval_batches(
        split,
        data=data,
        batch_size=min(BATCH, len(split)),
        resolution=inputs.resolution,
        device="cpu" if task.trial is None else task.device,
        backend="dali" if backend == "synthetic" else backend,  # type: ignore[arg-type]
        threads=THREADS,
    )


@torch.no_grad()
def _probabilities(network: Network, batches: Batches) -> Tensor:
    """The softmax of the network's logits (N, classes) for each image."""
    return torch.cat([network(batch.images.float()).softmax(1).cpu() for batch in batches])


def _top(probabilities: Any, classes: Sequence[str], count: int) -> list[Json]:
    """The most probable classes of an image."""
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [{"class": classes[place], "probability": float(probabilities[place])} for place in order]
