"""Resource requests of cluster jobs, in the syntax of each scheduler."""

from __future__ import annotations

from typing import Any

from engine.config import Resources, gpus_per_node
from engine.trial import UsageError

# Options that a scheduler does not have, and those that it requires.
UNSUPPORTED = {
    "slurm": ("image", "claim"),
    "pbs": ("qos", "image", "claim"),
    "lsf": ("qos", "memory_gb", "image", "claim"),
    "kubernetes": ("account", "qos", "time", "job_options"),
}
REQUIRED = {
    "slurm": ("time",),
    "pbs": ("time", "cpus"),
    "lsf": ("time", "cpus"),
    "kubernetes": ("cpus", "memory_gb", "image", "claim"),
}
HINTS = {
    "qos": "use --job-options if your site has one",
    "memory_gb": "the unit of its -M depends on the site; use --job-options '-M ...'",
    "time": "a pod has no time limit",
}


def check(scheduler: str, resources: Resources) -> None:
    """Raises UsageError for an option that the scheduler does not have, and for a missing one that it requires."""
    for name in UNSUPPORTED[scheduler]:
        if getattr(resources, name):
            hint = f": {HINTS[name]}" if name in HINTS else ""
            raise UsageError(f"{scheduler} does not support --{_flag(name)}{hint}")
    for name in REQUIRED[scheduler]:
        if not getattr(resources, name):
            raise UsageError(f"{scheduler} requires --{_flag(name)}")
    gpus_per_node(resources)


def slurm_options(resources: Resources) -> list[str]:
    """The #SBATCH options, except nodes and time."""
    gpus = gpus_per_node(resources)
    whole_node = not resources.cpus
    memory = f"--mem={resources.memory_gb}G" if resources.memory_gb else "--mem=0" if whole_node else ""  # 0: all of it
    return _options(
        "--exclusive" if whole_node else f"--cpus-per-task={resources.cpus}",
        memory,
        gpus and f"--gpus-per-node={gpus}",
        resources.partition and f"--partition={resources.partition}",
        resources.account and f"--account={resources.account}",
        resources.qos and f"--qos={resources.qos}",
        resources.job_options,
    )


def pbs_chunk(resources: Resources) -> str:
    """GPUs and memory of a node, as they follow `select=1:ncpus=N`."""
    gpus = gpus_per_node(resources)
    return (f":ngpus={gpus}" if gpus else "") + (f":mem={resources.memory_gb}gb" if resources.memory_gb else "")


def pbs_options(resources: Resources) -> list[str]:
    """The #PBS options, except the chunk and time."""
    return _options(
        resources.partition and f"-q {resources.partition}",
        resources.account and f"-A {resources.account}",
        resources.job_options,
    )


def lsf_options(resources: Resources) -> list[str]:
    """The #BSUB options, except cores and time."""
    gpus = gpus_per_node(resources)
    return _options(
        gpus and f'-gpu "num={gpus}"',
        resources.partition and f"-q {resources.partition}",
        resources.account and f"-P {resources.account}",
        resources.job_options,
    )


def pod_limits(resources: Resources) -> dict[str, str]:
    """The resource limits of a container, which are also its requests."""
    gpus = gpus_per_node(resources)
    limits = {"cpu": str(resources.cpus), "memory": f"{resources.memory_gb}Gi"}
    return {**limits, "nvidia.com/gpu": str(gpus)} if gpus else limits


def volume_claim(resources: Resources) -> tuple[str, str]:
    """The name and the mount point of the volume in --claim."""
    name, _, mount = resources.claim.partition(":")
    if not name or not mount.startswith("/"):
        raise UsageError(f"--claim {resources.claim}: write the claim and its mount point, like work:/work")
    return name, mount


def _options(*words: Any) -> list[str]:
    """The options that are set."""
    return [str(word) for word in words if word]


def _flag(name: str) -> str:
    return name.replace("_", "-")
