"""What the jobs of a cluster ask of their scheduler: options as it writes them, or why it cannot be asked."""

from __future__ import annotations

from typing import Any

from engine.config import Resources, gpus_per_node
from engine.trial import UsageError

# Options that a scheduler has no word for, and those that it must be given.
UNKNOWN = {
    "slurm": ("image", "claim"),
    "pbs": ("qos", "image", "claim"),
    "lsf": ("qos", "memory_gb", "image", "claim"),
    "kubernetes": ("account", "qos", "time", "job_options"),
}
NEEDED = {
    "slurm": ("time",),
    "pbs": ("time", "cpus"),
    "lsf": ("time", "cpus"),
    "kubernetes": ("cpus", "memory_gb", "image", "claim"),
}
HINTS = {
    "qos": "it may be part of --job-options",
    "memory_gb": "the unit of its -M is the site's; write --job-options '-M ...'",
    "time": "a pod runs until it is done",
}


def check(scheduler: str, asked: Resources) -> None:
    """Raises UsageError where the scheduler has no word for an option, or needs one that is not given."""
    for name in UNKNOWN[scheduler]:
        if getattr(asked, name):
            hint = f": {HINTS[name]}" if name in HINTS else ""
            raise UsageError(f"{scheduler} knows no --{_flag(name)}{hint}")
    for name in NEEDED[scheduler]:
        if not getattr(asked, name):
            raise UsageError(f"{scheduler} must be told --{_flag(name)}")
    gpus_per_node(asked)


def slurm_options(asked: Resources) -> list[str]:
    """What stands after #SBATCH, but for nodes and time."""
    gpus = gpus_per_node(asked)
    memory = f"--mem={asked.memory_gb}G" if asked.memory_gb else "" if asked.cpus else "--mem=0"  # 0: all of the node
    return _given(
        f"--cpus-per-task={asked.cpus}" if asked.cpus else "--exclusive",
        memory,
        gpus and f"--gpus-per-node={gpus}",
        asked.partition and f"--partition={asked.partition}",
        asked.account and f"--account={asked.account}",
        asked.qos and f"--qos={asked.qos}",
        asked.job_options,
    )


def pbs_chunk(asked: Resources) -> str:
    """What is to be found on a node beside cores, as it goes on after `select=1:ncpus=N`."""
    gpus = gpus_per_node(asked)
    return (f":ngpus={gpus}" if gpus else "") + (f":mem={asked.memory_gb}gb" if asked.memory_gb else "")


def pbs_options(asked: Resources) -> list[str]:
    """What stands after #PBS, but for the chunk and time."""
    return _given(
        asked.partition and f"-q {asked.partition}",
        asked.account and f"-A {asked.account}",
        asked.job_options,
    )


def lsf_options(asked: Resources) -> list[str]:
    """What stands after #BSUB, but for cores and time."""
    gpus = gpus_per_node(asked)
    return _given(
        gpus and f'-gpu "num={gpus}"',
        asked.partition and f"-q {asked.partition}",
        asked.account and f"-P {asked.account}",
        asked.job_options,
    )


def pod_limits(asked: Resources) -> dict[str, str]:
    """The limits of a container's resources, which are its requests too."""
    gpus = gpus_per_node(asked)
    limits = {"cpu": str(asked.cpus), "memory": f"{asked.memory_gb}Gi"}
    return {**limits, "nvidia.com/gpu": str(gpus)} if gpus else limits


def claimed(asked: Resources) -> tuple[str, str]:
    """Name and mount of the volume that --claim names."""
    name, _, mount = asked.claim.partition(":")
    if not name or not mount.startswith("/"):
        raise UsageError(f"--claim {asked.claim}: write the claim and where it is mounted, like work:/work")
    return name, mount


def _given(*words: Any) -> list[str]:
    return [str(word) for word in words if word]


def _flag(name: str) -> str:
    return name.replace("_", "-")
