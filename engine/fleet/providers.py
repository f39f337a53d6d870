"""Where Parsl starts its worker pools, and at which address the workers reach the driver.

There is one pool per machine. On this machine, or on the nodes of the Slurm allocation that this process runs in, this
process starts the pools. Otherwise each pool is a job of one node, and Parsl submits more jobs while tasks are waiting.
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
DRAIN_S = 1800  # a job takes no new tasks in this last part of its time, or in the last quarter if that is shorter
COMMANDS = {"slurm": ("sbatch", "scancel"), "pbs": ("qsub", "qdel"), "lsf": ("bsub", "bkill")}


@dataclass(frozen=True)
class Site:
    """How pools are started (`provider`), the `address` at which they reach the driver, and how many seconds after its
    start a pool stops taking tasks (`drain_s`; None: never)."""

    provider: ExecutionProvider
    address: str = LOOPBACK
    drain_s: int | None = None


def local(resources: Resources) -> bool:
    """Whether workers run on this machine only."""
    return resources.executor == "local" and allocated_nodes() == 1


def site(resources: Resources, layout: Layout, worker_init: str) -> Site:
    """The site that the resources ask for, with at most `layout.nodes` pools, one per machine.

    `worker_init` is the fleet's own environment: lines of shell that run first on each machine.
    Raises UsageError for options that the scheduler does not support, EnvironmentUnusable if it cannot be reached.
    """
    if resources.executor == "local":
        return _this_allocation(resources, layout.nodes, worker_init)
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
                f"--executor {resources.executor}: no {command} here; run this on a machine of the cluster"
            )
    provider = PROVIDERS[resources.executor](resources, {**blocks, "walltime": resources.time})
    _cancel_jobs_at_exit(provider, COMMANDS[resources.executor][1])
    limit = walltime_s(resources.time)
    return Site(provider, _address(resources), limit - min(limit // 4, DRAIN_S))


def _this_allocation(resources: Resources, nodes: int, worker_init: str) -> Site:
    from parsl.launchers import SimpleLauncher, WrappedLauncher
    from parsl.providers import LocalProvider

    blocks = {"init_blocks": 1, "min_blocks": 1, "max_blocks": 1, "worker_init": worker_init}
    if nodes == 1:
        return Site(LocalProvider(launcher=SimpleLauncher(), **blocks))
    # One job step on all nodes. It shares the job's resources, survives the loss of a node, and is not bound to cores.
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


PROVIDERS: dict[str, Callable[[Resources, dict[str, Any]], Any]] = {"slurm": _slurm, "pbs": _pbs, "lsf": _lsf}


def _kubernetes(resources: Resources, blocks: dict[str, Any]) -> ExecutionProvider:
    from parsl.errors import OptionalModuleMissing
    from parsl.providers import KubernetesProvider

    limits, gpus, claim = jobs.pod_limits(resources), gpus_per_node(resources), jobs.volume_claim(resources)
    try:
        provider = KubernetesProvider(
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
    except Exception as error:  # one of the client's, which cannot be named where the client is not installed
        raise EnvironmentUnusable(f"--executor kubernetes: {error}") from error
    create = provider.kube_client.create_namespaced_pod

    def create_once(namespace: str, body: Any) -> Any:
        body.spec.restart_policy = "Never"  # otherwise a pod whose driver is gone would restart forever
        return create(namespace=namespace, body=body)

    provider.kube_client.create_namespaced_pod = create_once
    return provider


def _cancel_jobs_at_exit(provider: ExecutionProvider, cancel: str) -> None:
    """Cancels a provider's jobs, running or queued, when this process ends for any reason.

    A shell in a session of its own reads the job ids from a pipe. The pipe closes when this process ends.
    """
    script = 'trap "" INT TERM HUP USR1 USR2; jobs=$(cat); [ -z "$jobs" ] || exec "$1" $jobs'
    watcher = subprocess.Popen(
        ["sh", "-c", script, "sh", cancel],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    submit = provider.submit

    def submit_and_record(*arguments: Any) -> Any:
        job = submit(*arguments)
        if job and watcher.stdin:
            watcher.stdin.write(f"{job}\n".encode())
            watcher.stdin.flush()
        return job

    provider.submit = submit_and_record


def _address(resources: Resources) -> str:
    """The address at which workers reach this process: --address, or that of this machine's host name.

    If the host name resolves to loopback only, it is the address from which this machine reaches other networks.
    """
    if resources.address:
        return resources.address
    found = LOOPBACK
    try:
        found = socket.gethostbyname(socket.gethostname())
        if found.startswith("127."):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
                route.connect(("192.0.2.1", 9))  # reserved for documentation (RFC 5737); nothing is sent
                found = str(route.getsockname()[0])
    except OSError:
        pass  # without a network, all nodes are on this machine
    return found
