"""Which devices are available, and how many workers run on each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from engine.config import Resources, gpus_per_node
from engine.trial import EnvironmentUnusable, UsageError

MAX_WORKERS_PER_CORE = 16


@dataclass(frozen=True, slots=True)
class Layout:
    """How many workers run, and where: `workers` in all, the same number on each of `nodes` machines.

    `devices` are the GPUs of a machine, as tokens of CUDA_VISIBLE_DEVICES; each has `workers_per_device` workers. It is
    empty for CPU workers (`device` "cpu"), and for GPUs of machines that cannot be inspected from here: workers there
    use the GPUs that they see.
    """

    workers: int
    devices: tuple[str, ...] = ()
    device: str = "cpu"
    workers_per_device: int = 1
    nodes: int = 1

    @property
    def workers_per_machine(self) -> int:
        return self.workers // self.nodes


def visible_devices() -> tuple[str, ...]:
    """The GPUs that this process may use, as opaque tokens: numbers, UUIDs or MIG names.

    They come from CUDA_VISIBLE_DEVICES if it is set, as schedulers do. Otherwise they are all that nvidia-smi lists:
    GPUs by number, and the MIG slices of a partitioned GPU by UUID.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        tokens = [token.strip() for token in visible.split(",")]
        # CUDA stops at the first entry that it does not know. -1 is the usual way to say "none"; Slurm writes
        # NoDevFiles for a job without GPUs.
        stop = next((i for i, token in enumerate(tokens) if token in ("", "-1", "NoDevFiles")), len(tokens))
        return tuple(tokens[:stop])
    if shutil.which("nvidia-smi") is None:
        return ()
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return _parse_listing(listed.stdout)


def _parse_listing(text: str) -> tuple[str, ...]:
    """The tokens in the output of `nvidia-smi -L`: a line for each GPU, followed by an indented line for each slice."""
    tokens = []
    for number, gpu in enumerate(re.split(r"^GPU ", text, flags=re.MULTILINE)[1:]):
        tokens += re.findall(r"^\s+MIG .*UUID: (MIG-[\w/-]+)", gpu, flags=re.MULTILINE) or [str(number)]
    return tuple(tokens)


def choose_devices(asked: str, visible: tuple[str, ...]) -> tuple[str, ...]:
    """The devices that --gpus selects: auto (all), a count, or comma-separated positions among the visible GPUs."""
    if asked == "auto":
        return visible
    try:
        numbers = [int(part) for part in asked.split(",")]
    except ValueError:
        raise UsageError(f"--gpus {asked}: write auto, a count (8), or positions among the visible (0,2)") from None
    if "," not in asked and numbers[0] < 0:
        raise UsageError(f"--gpus {asked}: a count cannot be negative")
    if not visible and numbers != [0]:
        raise UsageError(f"--gpus {asked}: no GPU is visible; check nvidia-smi, or use --device cpu")
    if "," not in asked:
        count = numbers[0]
        if count > len(visible):
            raise UsageError(f"--gpus {asked}: only {len(visible)} visible; ask for at most {len(visible)}")
        return visible[:count]
    if len(set(numbers)) != len(numbers) or any(not 0 <= number < len(visible) for number in numbers):
        raise UsageError(
            f"--gpus {asked}: choose different positions from 0 to {len(visible) - 1} ({len(visible)} visible)"
        )
    return tuple(visible[number] for number in numbers)


def allocated_nodes() -> int:
    """The number of nodes of the Slurm job that this process runs in, if it can start programs on them; else 1."""
    count = os.environ.get("SLURM_JOB_NUM_NODES", "")
    inside = count.isdecimal() and "SLURM_JOB_ID" in os.environ and shutil.which("srun") is not None
    return int(count) if inside else 1


def layout(resources: Resources) -> Layout:
    """The workers and devices that the resources ask for; raises UsageError or EnvironmentUnusable if it cannot be."""
    found = _layout(resources)
    cores = len(os.sched_getaffinity(0))
    if resources.executor == "local" and found.workers_per_machine > MAX_WORKERS_PER_CORE * cores:
        raise UsageError(
            f"--workers {resources.workers}: this machine has {cores} CPU cores; give at most "
            f"{MAX_WORKERS_PER_CORE * cores}, or leave it out"
        )
    return found


def _layout(resources: Resources) -> Layout:
    if resources.device == "cpu" and resources.gpus not in ("auto", "0"):
        raise UsageError(f"--device cpu and --gpus {resources.gpus} contradict each other; give only one of them")
    if resources.executor != "local":
        return _cluster_layout(resources)
    nodes = allocated_nodes()
    devices = () if resources.device == "cpu" else choose_devices(resources.gpus, visible_devices())
    if nodes > 1 and "," in resources.gpus:
        raise UsageError(f"--gpus {resources.gpus}: on {nodes} nodes, give a count of GPUs per node")
    if devices:
        per_device = _workers_per_device(resources, len(devices))
        return Layout(len(devices) * per_device * nodes, devices if nodes == 1 else (), "cuda", per_device, nodes)
    if resources.device == "cuda":
        raise EnvironmentUnusable("--device cuda: no GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return Layout((resources.workers or len(os.sched_getaffinity(0))) * nodes, nodes=nodes)


def _cluster_layout(resources: Resources) -> Layout:
    """The layout over jobs of a cluster, whose nodes cannot be inspected from here."""
    nodes, gpus = resources.max_nodes, gpus_per_node(resources)
    if gpus:
        per_device = _workers_per_device(resources, gpus)
        return Layout(gpus * per_device * nodes, (), "cuda", per_device, nodes)
    if not resources.workers:
        raise UsageError(f"--executor {resources.executor} without GPUs: give the number of --workers per node")
    return Layout(resources.workers * nodes, nodes=nodes)


def _workers_per_device(resources: Resources, gpus: int) -> int:
    per_device, rest = divmod(resources.workers or gpus, gpus)
    if rest or not per_device:
        raise UsageError(f"--workers {resources.workers} on {gpus} GPUs: give a multiple of {gpus}, or leave it out")
    return per_device


def describe(layout: Layout) -> str:
    """A layout in words: "16 workers on 8 GPUs (0, 1, ...)"."""
    kind = "CPU " if layout.device == "cpu" else ""
    text = f"{layout.workers} {kind}worker{'s' if layout.workers > 1 else ''}"
    if layout.devices:
        text += f" on {len(layout.devices)} GPU{'s' if len(layout.devices) > 1 else ''} ({', '.join(layout.devices)})"
    return text + (f" on {layout.nodes} machines" if layout.nodes > 1 else "")
