"""Which devices there are, and which workers to put on them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from engine.config import Resources, gpus_per_node
from engine.trial import EnvironmentUnusable, UsageError


@dataclass(frozen=True, slots=True)
class Layout:
    """Which workers to have: `workers` in all, the same number on each of `nodes` machines.

    Those of a machine are put to its `devices`, tokens of CUDA_VISIBLE_DEVICES, `share` of them to each. Empty for
    CPU workers (`device` "cpu"), and for GPUs of machines that cannot be looked at from here: workers there take what
    their machine shows them.
    """

    workers: int
    devices: tuple[str, ...] = ()
    device: str = "cpu"
    share: int = 1
    nodes: int = 1


def visible_devices() -> tuple[str, ...]:
    """The GPUs that this process may use, as opaque tokens: numbers, UUIDs or MIG names.

    CUDA_VISIBLE_DEVICES where it is set (a scheduler sets it), else all that nvidia-smi lists: GPUs by number, the
    slices (MIG) of one that is cut up by UUID.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        tokens = [token.strip() for token in visible.split(",")]
        # CUDA itself stops at the first entry that it does not know; -1 is the usual way to say "none", NoDevFiles
        # that of Slurm where a job was given no GPU.
        stop = next((i for i, token in enumerate(tokens) if token in ("", "-1", "NoDevFiles")), len(tokens))
        return tuple(tokens[:stop])
    if shutil.which("nvidia-smi") is None:
        return ()
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return _listed(listed.stdout)


def _listed(said: str) -> tuple[str, ...]:
    """The tokens of `nvidia-smi -L`: a line per GPU, an indented one per slice below its GPU."""
    tokens = []
    for number, gpu in enumerate(re.split(r"^GPU ", said, flags=re.MULTILINE)[1:]):
        tokens += re.findall(r"^\s+MIG .*UUID: (MIG-[\w/-]+)", gpu, flags=re.MULTILINE) or [str(number)]
    return tuple(tokens)


def choose_devices(asked: str, visible: tuple[str, ...]) -> tuple[str, ...]:
    """The devices that --gpus means: auto (all), a count, or positions among the visible ones joined by commas."""
    if asked == "auto":
        return visible
    try:
        numbers = [int(part) for part in asked.split(",")]
    except ValueError:
        raise UsageError(f"--gpus {asked}: write auto, a count (8), or positions among the visible (0,2)") from None
    if "," not in asked:
        count = numbers[0]
        if count < 0:
            raise UsageError(f"--gpus {asked}: a count cannot be negative")
        if count > len(visible):
            raise UsageError(
                f"--gpus {asked}: {count} asked for, {len(visible)} visible; ask for at most {len(visible)}"
                + ("" if visible else ", or take --device cpu")
            )
        return visible[:count]
    if not visible:
        raise UsageError(f"--gpus {asked}: no GPU is visible; check nvidia-smi, or take --device cpu")
    if len(set(numbers)) != len(numbers) or any(not 0 <= number < len(visible) for number in numbers):
        raise UsageError(
            f"--gpus {asked}: choose different positions from 0 to {len(visible) - 1} ({len(visible)} visible)"
        )
    return tuple(visible[number] for number in numbers)


def allocated_nodes() -> int:
    """Machines of the Slurm job that this process is part of, where it can start something on them; else 1."""
    count = os.environ.get("SLURM_JOB_NUM_NODES", "")
    inside = count.isdecimal() and "SLURM_JOB_ID" in os.environ and shutil.which("srun") is not None
    return int(count) if inside else 1


def layout(resources: Resources) -> Layout:
    """Workers and devices for the resources asked for; UsageError where they are not there."""
    if resources.device == "cpu" and resources.gpus not in ("auto", "0"):
        raise UsageError(f"--device cpu and --gpus {resources.gpus} contradict each other; give one of them")
    if resources.executor != "local":
        return _elsewhere(resources)
    nodes = allocated_nodes()
    devices = () if resources.device == "cpu" else choose_devices(resources.gpus, visible_devices())
    if nodes > 1 and "," in resources.gpus:
        raise UsageError(f"--gpus {resources.gpus}: on {nodes} nodes give a count, which holds for each of them")
    if devices:
        share = _share(resources, len(devices))
        return Layout(len(devices) * share * nodes, devices if nodes == 1 else (), "cuda", share, nodes)
    if resources.device == "cuda":
        raise EnvironmentUnusable("--device cuda: no GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return Layout((resources.workers or len(os.sched_getaffinity(0))) * nodes, nodes=nodes)


def _elsewhere(resources: Resources) -> Layout:
    """On jobs of a cluster, whose machines take what they were given."""
    nodes, gpus = resources.max_nodes, gpus_per_node(resources)
    if gpus:
        share = _share(resources, gpus)
        return Layout(gpus * share * nodes, (), "cuda", share, nodes)
    if not resources.workers:
        raise UsageError(f"--executor {resources.executor} without GPUs: say how many --workers a node shall have")
    return Layout(resources.workers * nodes, nodes=nodes)


def _share(resources: Resources, gpus: int) -> int:
    """How many workers a GPU has."""
    share, rest = divmod(resources.workers or gpus, gpus)
    if rest or not share:
        raise UsageError(f"--workers {resources.workers} on {gpus} GPUs: give a multiple, or leave it out")
    return share


def describe(wanted: Layout) -> str:
    """Workers and devices for people."""
    kind = "CPU " if wanted.device == "cpu" else ""
    text = f"{wanted.workers} {kind}worker{'s' if wanted.workers > 1 else ''}"
    if wanted.devices:
        text += f" on {len(wanted.devices)} GPU{'s' if len(wanted.devices) > 1 else ''} ({', '.join(wanted.devices)})"
    return text + (f" on {wanted.nodes} machines" if wanted.nodes > 1 else "")
