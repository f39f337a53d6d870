"""A trained architecture as files that work without this program: weights, model.py, ONNX, torch.export, a card."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from engine.data.batches import shorter_side
from engine.export.card import model_card
from engine.export.graph_code import OWN, graph_class
from engine.export.onnx_file import Logits, exported, onnx_program
from engine.export.standalone import Imported, NotSelfContained, call_of, closure_of
from engine.latency.runtimes import Conditions
from engine.latency.time_probes import Call, open_network, open_session, quietest, time_in_rounds
from engine.networks import count_cost
from engine.run_folder import RunFolder, export_record_of
from engine.space import SearchSpace
from engine.spaces.load import load_space
from engine.tasks import ExportTask, task_from_json
from engine.training import teacher as teachers
from engine.training.context import device_name
from engine.training.weights import load_network, save_weights
from engine.trial import Architecture, EngineError, UsageError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Json = dict[str, Any]
Forward = Callable[[Tensor], Tensor]

TOLERANCE = 1e-4  # largest difference of a logit, float32
CHECKED_BATCHES = (1, 3)
LATENCY_BATCHES = (1, 64)
ALWAYS = {"README.md", "weights.safetensors"}
OPTIONAL = {"model.onnx", "model.pt2", "model.py", export_record_of(Path()).name}
WRITTEN = ALWAYS | OPTIONAL | {"__pycache__"}  # which appears when model.py is imported

# The end of model.py, the same for every network; the lines of `_constants` come before it.
LOADER = '''

class Model(nn.Module):
    """Images (N, 3, RESOLUTION, RESOLUTION) from `preprocess` to logits (N, len(CLASSES))."""

    def __init__(self) -> None:
        super().__init__()
        self.network = {call}

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


def load(path: str | Path = Path(__file__).with_name("weights.safetensors")) -> Model:
    """The trained model in evaluation mode; `.train()` trains it further."""
    model = Model()
    model.network.load_state_dict(read_safetensors(path))
    return model.eval()


def preprocess(pixels: Tensor) -> Tensor:
    """Pixels (N, 3, RESOLUTION, RESOLUTION), RGB, 0 to 255, normalised as in the training of the model."""
    mean, std = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels / 255 - mean) / std


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: the length of a JSON header, the header, the bytes."""
    content = Path(path).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    weights = {{}}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, end = (start + offset for offset in entry["data_offsets"])
            dtypes = {{"F32": torch.float32, "F64": torch.float64, "I64": torch.int64, "BOOL": torch.bool}}
            values = torch.frombuffer(bytearray(content[first:end]), dtype=dtypes[entry["dtype"]])
            weights[name] = values.view(entry["shape"])
    return weights
'''


def run_export(payload: Json) -> Json:
    """ExportTask -> what the command prints: writes the weights of a trial in every format, and verifies each.

    A temporary folder is written first and then replaces an older export. Raises UsageError if the folder holds other
    files, there are no weights, or torch cannot export the network, and EngineError if a format gives other logits.
    """
    torch.set_num_threads(1)
    task = task_from_json(ExportTask, payload)
    trial, out = task.trial, task.out.resolve()
    check_free(out)
    space, weights = load_space(task.space), RunFolder(task.run_dir).weights(trial)
    network = load_network(weights, task.space, trial, len(task.normalisation.classes))
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        report = write_formats(Logits(network).eval(), space, trial.architecture, trial.fidelity.width, task, temporary)
        card = {**task.card, **_provenance(task)}
        (temporary / "README.md").write_text(model_card(report, replace(task, card=card)))
        files = sorted(path.name for path in temporary.iterdir() if path.is_file())
        record = {**report, "files": files, "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
        export_record_of(temporary).write_text(json.dumps(record, indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {**report, "folder": str(out)}


def check_free(out: Path) -> None:
    """Raises UsageError unless a folder is new, empty, or holds only an earlier export: its content will be removed."""
    way_out = "give --out a folder that is new, empty, or an earlier export"
    if Path.cwd().is_relative_to(out):
        raise UsageError(f"an export replaces its folder, and you are in {out}; {way_out}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; {way_out}")
    present = {path.name for path in out.iterdir()} if out.exists() else set()
    if present and not ALWAYS <= present <= WRITTEN:
        first = min(present - WRITTEN or present)
        raise UsageError(f"an export replaces its folder, and {out} holds {first}, which would be lost; {way_out}")


def write_formats(
    model: Logits, space: SearchSpace, architecture: Architecture, width: float, task: ExportTask, folder: Path
) -> Json:
    """Writes a model in every format and checks each; returns costs, latencies, the difference of each format, and, if
    there is no model.py, the reason."""
    save_weights(
        folder / "weights.safetensors", model.network, {"space": space.name, "architecture": str(architecture)}
    )
    formats: dict[str, Forward] = {}
    reason = ""
    try:
        (folder / "model.py").write_text(standalone(model.network, space, architecture, width, task))
        formats["model.py"] = _import(folder / "model.py").load()
    except Exception as error:  # a user's file may contain anything
        (folder / "model.py").unlink(missing_ok=True)
        reason = str(error) if isinstance(error, NotSelfContained) else f"{type(error).__name__}: {error}"
    program = exported(model, task.resolution)
    torch.export.save(program, folder / "model.pt2")
    formats["model.pt2"] = torch.export.load(folder / "model.pt2").module()
    session = to_onnx(program, task, folder / "model.onnx")
    formats["model.onnx"] = lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    differences = {name: difference(model, other, task.resolution) for name, other in formats.items()}
    for name, found in differences.items():
        if not found <= TOLERANCE:
            raise EngineError(
                f"{name} differs from the checkpoint of {architecture} by {found:.1e} in a logit, more than "
                f"{TOLERANCE:.0e}; nothing was written"
            )
    macs, params = count_cost(model.network, task.resolution)
    return {
        "architecture": str(architecture),
        "macs": macs,
        "params": params,
        "differences": differences,
        "no_model_py": reason,
        "latency_ms": latencies(
            model, (folder / "model.onnx").read_bytes(), task.resolution, torch.device(task.device)
        ),
        "device": device_name(torch.device(task.device)),
    }


def standalone(
    network: nn.Module, space: SearchSpace, architecture: Architecture, width: float, task: ExportTask
) -> str:
    """The text of model.py: the code that the space's `build` needs, its call, and a reader of the weights. A network
    cut out of a library's is written layer by layer instead.

    Raises NotSelfContained if that needs more than torch.
    """
    if isinstance(network, fx.GraphModule):
        closure, call, written = closure_of(*OWN), "Network()", "\n\n\n" + graph_class(network, "Network")
    else:
        build, first = call_of(space.build)
        closure, written = closure_of(build), ""
        call = f"{build.__name__}({first}ARCHITECTURE, len(CLASSES), {width})"
    loader_imports = {
        Imported("json", "", "json"),
        Imported("pathlib", "Path", "Path"),
        Imported("torch", "", "torch"),
        Imported("torch", "Tensor", "Tensor"),
        Imported("torch", "nn", "nn"),
    }
    constants = {"ARCHITECTURE", "CLASSES", "RESOLUTION", "MEAN", "STD"}
    closure.add_imports(loader_imports, constants | {"Model", "load", "preprocess", "read_safetensors"})
    head = f'"""{space.name}, architecture {architecture}: `load()` returns the trained model. Needs only torch."""'
    imports = ["from __future__ import annotations", "", *closure.import_lines()]
    lines = [head, "", *imports, "", *_constants(architecture, task), "", "", closure.text() + written]
    return "\n".join(lines) + "\n" + LOADER.format(call=call)


def _constants(architecture: Architecture, task: ExportTask) -> list[str]:
    return [
        f"ARCHITECTURE = {architecture.choices}",
        f"CLASSES = {json.dumps(task.normalisation.classes, ensure_ascii=False)}",
        f"RESOLUTION = {task.resolution}  # pixels",
        "# Per channel of the training images, for pixels in 0..1.",
        f"MEAN, STD = {tuple(task.normalisation.mean)}, {tuple(task.normalisation.std)}",
    ]


def to_onnx(program: torch.export.ExportedProgram, task: ExportTask, path: Path) -> InferenceSession:
    """Writes model.onnx, from "images" (batch, 3, R, R) to "logits"; returns it opened by onnxruntime.

    Its metadata hold, as JSON, the classes, resolution, mean and std, and the pixels of the shorter side before the
    centre crop (null: images are resized whole).
    """
    written = onnx_program(program)
    cropped = shorter_side(task.resolution) if task.card["files"] else None
    facts = {**asdict(task.normalisation), "resolution": task.resolution, "shorter_side": cropped}
    for key, value in facts.items():
        written.model.metadata_props[key] = json.dumps(value)
    written.save(path)
    return open_session(str(path))


def difference(model: nn.Module, other: Forward, resolution: int) -> float:
    """The largest difference of a logit between two formats of a model, on batches of noise on the CPU."""
    generator = torch.Generator().manual_seed(0)
    found = 0.0
    with torch.no_grad():
        for batch in CHECKED_BATCHES:
            images = torch.randn(batch, 3, resolution, resolution, generator=generator)
            found = max(found, float((model(images) - other(images)).abs().max()))
    return found


def latencies(model: Logits, content: bytes, resolution: int, device: torch.device) -> dict[str, float]:
    """Milliseconds by runtime and batch, like "torch, batch 1"; `content` is that of its ONNX file."""
    network, ready = model.network, dict[str, Callable[[], Call]]()
    for batch in LATENCY_BATCHES:
        ready[f"torch, batch {batch}"] = Conditions("torch", resolution, batch, device).ready(lambda: network)
        shape = (batch, 3, resolution, resolution)
        ready[f"onnxruntime, batch {batch}"] = partial(open_network, content, shape)
    found = time_in_rounds(list(ready.values()))
    return {name: round(quietest(rounds), 3) for name, rounds in zip(ready, found, strict=True)}


def _provenance(task: ExportTask) -> Json:
    """The facts for the model card that only the exporting machine knows: itself, its versions, the teacher's card."""
    name, teacher = "a teacher whose file is missing", task.teacher
    if teacher.is_file():
        card = teachers.read_card(teacher)
        name = f"`{card.network}`, validation accuracy {100 * card.accuracy:.2f} %"
    device = device_name(torch.device(task.device))
    processor = next((li.split(":")[1].strip() for li in _cpuinfo() if li.startswith("model name")), platform.machine())
    machine = f"one thread of {processor}" + ("" if device == "cpu" else f" (onnxruntime) and {device} (torch)")
    versions = {name: version(name) for name in ("torch", "onnx", "onnxruntime")}
    return {
        "distillation": task.card["distillation"].replace("TEACHER", name),
        "machine": machine,
        "versions": versions,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def _import(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("exported_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
