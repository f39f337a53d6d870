"""Batch scripts and manifests that run a search as one job, and requeue the job until the search has finished.

Before its time limit a job is warned, its search drains and exits with 75, and the job is requeued: by `scontrol
requeue` on Slurm, by `qsub` of the same script on PBS (only operators may requeue), by a requeue exit code on LSF, and
as another pod of a Kubernetes Job. A search that has finished, or that would fail again, ends the job.
"""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from engine.config import Resources, walltime_s
from engine.fleet import jobs
from engine.trial import UsageError

DRAINED = 75  # exit code of a drained search: EX_TEMPFAIL of sysexits.h
FINAL = [1, 2, 3, 4]  # exit codes of a search that would fail again
MARGIN_S = 30  # after the grace period, for the search to close and for the script to act


@dataclass(frozen=True, slots=True)
class Job:
    """A search for a scheduler to run: `program`, with `arguments`, in the working directory `folder`."""

    arguments: tuple[str, ...]
    program: tuple[str, ...]
    folder: str
    name: str
    script: str  # the file that the script is written to
    output: str  # folder for the output of the job
    resources: Resources
    nodes: int = 1
    requeues: int = 20

    @property
    def warning_s(self) -> int:
        """How many seconds before its time limit the job is warned."""
        return math.ceil(self.resources.grace_s) + MARGIN_S


def render(scheduler: str, job: Job) -> str:
    """The script or manifest of a job; raises UsageError where the scheduler cannot do what is asked."""
    jobs.check(scheduler, job.resources)
    if odd := re.search(r"[^\w./+=,@-]", job.output):
        raise UsageError(
            f"the run folder {job.output} contains '{odd[0]}', which schedulers do not accept; choose another --run-dir"
        )
    if job.resources.time and walltime_s(job.resources.time) < 2 * job.warning_s:
        raise UsageError(
            f"--time {job.resources.time} is too short: the job is warned {job.warning_s} s before its time limit "
            f"(--grace-s plus {MARGIN_S} s); give at least twice that"
        )
    if job.nodes > 1 and scheduler != "slurm":
        raise UsageError(
            f"submit {scheduler} --nodes {job.nodes}: only Slurm supports jobs of several nodes; submit one node, or "
            f"run search --executor {scheduler} --max-nodes {job.nodes}"
        )
    return RENDERERS[scheduler](job)


def slurm(job: Job) -> str:
    """A script for sbatch. `B:` sends the warning to the script only, not to the workers."""
    directives = [
        f"--job-name={job.name}",
        f"--output={job.output}/slurm-%j.out",
        "--open-mode=append",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--time={job.resources.time}",
        f"--signal=B:USR1@{job.warning_s}",
        "--requeue",
        *(["--no-kill"] if job.nodes > 1 else []),  # keep the other nodes when one is lost
        *jobs.slurm_options(job.resources),
    ]
    requeue = f"""
        if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {job.requeues} ]; then
            {_give_up(job)}
        fi
        task=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
        scontrol requeue "${{task:-$SLURM_JOB_ID}}"
    """
    return _script(job, "sbatch", [f"#SBATCH {line}" for line in directives], requeue)


def pbs(job: Job) -> str:
    """A script for qsub. PBS gives no warning, so the search gets a time limit."""
    directives = [
        f"-N {job.name[:230]}",
        f"-o {job.output}/pbs.out",
        "-j oe",
        f"-l select=1:ncpus={job.resources.cpus}{jobs.pbs_chunk(job.resources)}",
        f"-l walltime={job.resources.time}",
        "-r y",
        *jobs.pbs_options(job.resources),
    ]
    requeue = f"""
        if [ "${{MFKD_REQUEUES:-0}}" -ge {job.requeues} ]; then
            {_give_up(job)}
        fi
        qsub -v MFKD_REQUEUES="$((${{MFKD_REQUEUES:-0}} + 1))" {shlex.quote(job.script)}
    """
    limit = [f"--time-limit={walltime_s(job.resources.time) - MARGIN_S}"] if job.resources.time_limit == "auto" else []
    return _script(job, "qsub", [f"#PBS {line}" for line in directives], requeue, *limit)


def lsf(job: Job) -> str:
    """A script for bsub, which reads it from stdin. A file counts the requeues, since LSF does not tell the job."""
    hours, minutes = divmod(-(-walltime_s(job.resources.time) // 60), 60)
    directives = [
        f"-J {job.name}",
        f"-o {job.output}/lsf-%J.out",
        f"-n {job.resources.cpus}",
        '-R "span[hosts=1]"',
        f"-W {hours}:{minutes:02}",
        f"-wa 'USR1' -wt '{-(-job.warning_s // 60)}'",
        "-r",
        f'-Q "{DRAINED}"',
        *jobs.lsf_options(job.resources),
    ]
    requeue = f"""
        tally={shlex.quote(job.output)}/lsf-$LSB_JOBID.requeues
        echo >> "$tally"
        if [ "$(wc -l < "$tally")" -gt {job.requeues} ]; then
            {_give_up(job)}
        fi
    """
    return _script(job, "bsub <", [f"#BSUB {line}" for line in directives], requeue)


def _script(job: Job, submit: str, directives: list[str], requeue: str, *more: str) -> str:
    """A bash script: directives, then the search, then `requeue` if it has drained.

    The search runs in the background, since bash handles a signal only after a foreground command has ended; bash makes
    background commands ignore INT. Schedulers send INT and TERM to every process of a job that is cancelled, or
    preempted and requeued by the scheduler itself. In both cases the script must not requeue the job.
    """
    command = " \\\n    ".join([shlex.join(job.program), *map(shlex.quote, job.arguments), *more])
    setup = f"{job.resources.worker_init}\n" if job.resources.worker_init else ""
    head = "\n".join(["#!/bin/bash", f"# Submit with: {submit} FILE", *directives])
    return f"""{head}

cd {shlex.quote(job.folder)} || exit 3
{setup}
cancelled= signalled=
trap 'signalled=yes; kill -USR1 "$search" 2> /dev/null' USR1 USR2     # the warning: drain
trap 'signalled=yes; cancelled=yes' TERM                              # the search has received it too
trap 'signalled=yes; cancelled=yes; kill "$search" 2> /dev/null' INT  # the search ignores INT
{command} &
search=$!
while
    signalled=
    wait "$search"; got=$?
    [ "$got" -ne 127 ] && code=$got  # 127: the search had ended before the signal
    [ -n "$signalled" ]
do :; done

if [ "$code" -eq {DRAINED} ]; then
    [ -n "$cancelled" ] && exit 143
{textwrap.indent(textwrap.dedent(requeue).strip(), "    ")}
fi
exit "$code"
"""


def _give_up(job: Job) -> str:
    """Shell that ends a script after its last requeue, with a code that is not that of a drained search."""
    return f'echo "not finished after {job.requeues} requeues; submit the script again to resume" >&2; exit 1'


def kubernetes(job: Job) -> str:
    """A manifest for kubectl create. A drained pod counts against the retry limit; an evicted one does not."""
    resources = job.resources
    claim, mount = jobs.volume_claim(resources)
    command = [*job.program, *job.arguments]
    shell = f"{resources.worker_init}\nexec {shlex.join(command)}"
    container = {
        "name": "search",
        "image": resources.image,
        "command": ["bash", "-c", shell] if resources.worker_init else command,
        "workingDir": mount,
        "resources": {"limits": jobs.pod_limits(resources)},
        "volumeMounts": [{"name": "work", "mountPath": mount}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    rules: list[dict[str, Any]] = [
        {"action": "FailJob", "onExitCodes": {"containerName": "search", "operator": "In", "values": FINAL}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    pod = {
        "restartPolicy": "Never",  # required by a pod failure policy; the Job creates a new pod instead
        "terminationGracePeriodSeconds": job.warning_s,
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    spec = {"backoffLimit": job.requeues, "podFailurePolicy": {"rules": rules}, "template": {"spec": pod}}
    metadata = {"name": _label(job.name), **({"namespace": resources.partition} if resources.partition else {})}
    manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
    return f"# Submit with: kubectl create -f FILE\n{yaml.safe_dump(manifest, sort_keys=False, width=1000)}"


def _label(name: str) -> str:
    """The name of a run as a Kubernetes name: RFC 1123, at most 63 characters."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[:63].strip("-") or "search"


RENDERERS: dict[str, Callable[[Job], str]] = {"slurm": slurm, "pbs": pbs, "lsf": lsf, "kubernetes": kubernetes}
