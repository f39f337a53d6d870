"""Which machines Parsl starts its pools of workers on, and where the workers reach the driver.

A pool serves one machine. On this machine, or on all of the Slurm allocation that this process is in, pools are its
children; otherwise each is a job of one node, and Parsl hands in more jobs while there are tasks for them.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.config import Resources, gpus_per_node, walltime_s
from engine.fleet import jobs
from engine.fleet.devices import Layout, allocated_nodes
from engine.trial import EnvironmentUnusable

if TYPE_CHECKING:
    from parsl.providers.base import ExecutionProvider

LOOPBACK = "127.0.0.1"
LAST_S = 1800  # before the end of its time, or a quarter of that, a job takes no more tasks
COMMANDS = {"slurm": ("sbatch", "scancel"), "pbs": ("qsub", "qdel"), "lsf": ("bsub", "bkill")}


@dataclass(frozen=True)
class Site:
    """Where workers run: how pools are started (`provider`, with its launcher), the driver's `address` for them, and
    after how many seconds a pool takes no more tasks."""

    provider: ExecutionProvider
    address: str = LOOPBACK
    drain_s: int | None = None


def local(resources: Resources) -> bool:
    """Whether workers run on this machine alone."""
    return resources.executor == "local" and allocated_nodes() == 1


def provider(resources: Resources, wanted: Layout, worker_init: str) -> Site:
    """The site that the resources ask for, with `wanted.nodes` pools at most, one a machine.

    `worker_init` are lines of shell that must come first in what the provider runs on a machine: the fleet's own
    environment. How many workers a pool has is the fleet's matter (`wanted.workers // wanted.nodes`).
    Raises UsageError for options that the scheduler does not know, EnvironmentUnusable where it cannot be reached.
    """
    if resources.executor == "local":
        return _here(resources, wanted.nodes, worker_init)
    jobs.check(resources.executor, resources)
    setup = "\n".join([worker_init, *filter(None, [resources.worker_init])])
    blocks = {
        "init_blocks": max(1, resources.min_nodes),
        "min_blocks": resources.min_nodes,
        "max_blocks": resources.max_nodes,
        "worker_init": setup,
    }
    if resources.executor == "kubernetes":
        return Site(_kubernetes(resources, blocks), _address(resources))
    for command in COMMANDS[resources.executor]:
        if shutil.which(command) is None:
            raise EnvironmentUnusable(
                f"--executor {resources.executor}: there is no {command} here; run this on a machine of the cluster"
            )
    made = MAKERS[resources.executor](resources, {**blocks, "walltime": resources.time})
    _cancel_at_the_end(made, COMMANDS[resources.executor][1])
    limit = walltime_s(resources.time)
    return Site(made, _address(resources), limit - min(limit // 4, LAST_S))


def _here(resources: Resources, nodes: int, worker_init: str) -> Site:
    from parsl.launchers import SimpleLauncher, WrappedLauncher
    from parsl.providers import LocalProvider

    blocks = {"init_blocks": 1, "min_blocks": 1, "max_blocks": 1, "worker_init": worker_init}
    if nodes == 1:
        return Site(LocalProvider(launcher=SimpleLauncher(), **blocks))
    # One step over all nodes, which may use what the job has, goes on when a node is lost, and is bound to no cores.
    srun = (
        f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --overlap --cpu-bind=none --mem=0 "
        "--no-kill --kill-on-bad-exit=0"
    )
    return Site(LocalProvider(nodes_per_block=nodes, launcher=WrappedLauncher(srun), **blocks), _address(resources))


def _slurm(resources: Resources, blocks: dict[str, Any]) -> ExecutionProvider:
    from parsl.launchers import SimpleLauncher
    from parsl.providers import SlurmProvider

    lines = [f"#SBATCH {line}" for line in jobs.slurm_options(resources)]
    return SlurmProvider(exclusive=False, scheduler_options="\n".join(lines), launcher=SimpleLauncher(), **blocks)


def _pbs(resources: Resources, blocks: dict[str, Any]) -> ExecutionProvider:
    from parsl.launchers import SimpleLauncher
    from parsl.providers import PBSProProvider

    return PBSProProvider(
        cpus_per_node=resources.cpus,
        select_options=jobs.pbs_chunk(resources),
        scheduler_options="\n".join(f"#PBS {line}" for line in jobs.pbs_options(resources)),
        launcher=SimpleLauncher(),
        **blocks,
    )


def _lsf(resources: Resources, blocks: dict[str, Any]) -> ExecutionProvider:
    from parsl.launchers import SimpleLauncher
    from parsl.providers import LSFProvider

    return LSFProvider(
        request_by_nodes=False,
        cores_per_block=resources.cpus,
        cores_per_node=resources.cpus,
        bsub_redirection=True,  # bsub reads directives from stdin only
        scheduler_options="\n".join(f"#BSUB {line}" for line in jobs.lsf_options(resources)),
        launcher=SimpleLauncher(),
        **blocks,
    )


MAKERS: dict[str, Callable[[Resources, dict[str, Any]], Any]] = {"slurm": _slurm, "pbs": _pbs, "lsf": _lsf}


def _kubernetes(resources: Resources, blocks: dict[str, Any]) -> ExecutionProvider:
    from parsl.errors import OptionalModuleMissing
    from parsl.providers import KubernetesProvider

    limits, gpus, claim = jobs.pod_limits(resources), gpus_per_node(resources), jobs.claimed(resources)
    try:
        made = KubernetesProvider(
            image=resources.image,
            namespace=resources.partition or "default",
            max_cpu=resources.cpus,
            init_cpu=resources.cpus,
            max_mem=limits["memory"],
            init_mem=limits["memory"],
            extra_limits={"nvidia.com/gpu": str(gpus)} if gpus else {},
            persistent_volumes=[claim],
            **blocks,
        )
    except OptionalModuleMissing:
        raise EnvironmentUnusable("--executor kubernetes needs a package: pip install 'parsl[kubernetes]'") from None
    except Exception as error:  # of the client's, which is not always there to name
        raise EnvironmentUnusable(f"--executor kubernetes: {error}") from error
    create = made.kube_client.create_namespaced_pod

    def create_once(namespace: str, body: Any) -> Any:
        body.spec.restart_policy = "Never"  # else a pod whose driver is gone would start again for ever
        return create(namespace=namespace, body=body)

    made.kube_client.create_namespaced_pod = create_once
    return made


def _cancel_at_the_end(made: ExecutionProvider, cancel: str) -> None:
    """Has the jobs of a provider cancelled when this process ends, however it ends, those too that still wait.

    A shell of its own session holds their numbers, and the pipe that they come by closes with this process.
    """
    keep = 'trap "" INT TERM HUP USR1 USR2; jobs=$(cat); [ -z "$jobs" ] || exec "$1" $jobs'
    keeper = subprocess.Popen(
        ["sh", "-c", keep, "sh", cancel],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    submit = made.submit

    def noted(*arguments: Any) -> Any:
        job = submit(*arguments)
        if job and keeper.stdin:
            keeper.stdin.write(f"{job}\n".encode())
            keeper.stdin.flush()
        return job

    made.submit = noted


def _address(resources: Resources) -> str:
    """Where the workers reach this process: what the user says, or the address of this machine's name, or of its route
    to elsewhere where the name means the machine itself only."""
    if resources.address:
        return resources.address
    found = LOOPBACK
    try:
        found = socket.gethostbyname(socket.gethostname())
        if found.startswith("127."):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
                route.connect(("192.0.2.1", 9))  # an address of documents; nothing is sent
                found = str(route.getsockname()[0])
    except OSError:
        pass  # without a network, the nodes are this machine
    return found
