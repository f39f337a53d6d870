"""A two-node Slurm cluster for the tests: munged, slurmctld and two slurmd on loopback, with 8 simulated GPUs each."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

NODES = ("n1", "n2")
GPUS, CPUS = 8, 32

SLURM_CONF = """\
ClusterName=simulated
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
# More cores than this machine has.
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=30
KillWait=5
JobRequeue=1
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} Gres=gpu:{gpus}
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} Gres=gpu:{gpus}
PartitionName=gpu Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
"""
# slurmd requires character devices; links to one are enough.
GRES_CONF = "AutoDetect=off\nNodeName={nodes[0]},{nodes[1]} Name=gpu File={home}/gpu[0-{last}]\n"
CGROUP_CONF = (
    "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"
)


@dataclass(frozen=True)
class Slurm:
    """A running cluster, with all of its files in `home`; its clients find it by SLURM_CONF in the environment."""

    home: Path

    def run(self, *command: str) -> str:
        """The stdout of a client program; fails with its stderr."""
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def until(self, ask: Callable[[], Any], what: str, seconds: float = 180) -> Any:
        """Polls `ask` until its answer is true, and returns the answer; fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while not (answer := ask()):
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
            time.sleep(0.2)
        return answer

    def batch(self, command: list[str], output: Path, *options: str) -> str:
        """Submits a job that runs a command; returns its number."""
        whole = ["sbatch", "--parsable", f"--output={output}", *options, f"--wrap={shlex.join(command)}"]
        return self.run(*whole)

    def job(self, number: str) -> dict[str, str]:
        """The properties of a job: JobState, Restarts, ExitCode, NodeList and more."""
        pairs = (
            word.split("=", 1) for word in self.run("scontrol", "-o", "show", "job", number).split() if "=" in word
        )
        return dict(pairs)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def jobs(self) -> list[str]:
        """The numbers of the queued and running jobs."""
        return self.run("squeue", "-h", "-o", "%A").split()

    def start_node(self, name: str) -> None:
        """Starts a node, or brings a lost one back."""
        subprocess.run(["slurmd", "-N", name, "-f", str(self.home / "slurm.conf")], check=True)
        self.until(lambda: self.run("sinfo", "-h", "-n", name, "-o", "%T") == "idle", f"node {name} is idle")

    def lose_node(self, name: str) -> None:
        """A power cut: slurmd, the stepds of the node's jobs and every task on it die at once.

        slurmctld is told, since it would notice only after SlurmdTimeout.
        """
        tasks = self.tasks(name)
        stepds = {parent for task in tasks if (parent := _parent(task)) and parent.name().startswith("slurmstepd")}
        slurmd = psutil.Process(int((self.home / f"{name}.pid").read_text()))
        for process in [slurmd, *stepds, *tasks]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=lost")

    def tasks(self, node: str = "", besides: str = "") -> list[psutil.Process]:
        """The living processes of jobs on a node, or on both, except those of the job `besides`.

        Their environment holds the name of their node and the number of their job, whatever their parent is.
        """
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                seen = process.environ()
                if seen.get("SLURM_CONF") != str(self.home / "slurm.conf") or "SLURMD_NODENAME" not in seen:
                    continue
                wanted = node in ("", seen["SLURMD_NODENAME"]) and seen["SLURM_JOB_ID"] != besides
                if wanted and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def _parent(process: psutil.Process) -> psutil.Process | None:
    try:
        return process.parent()
    except psutil.Error:
        return None


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in held]


def _write_files(home: Path) -> None:
    values = {"home": home, "host": socket.gethostname().split(".")[0], "nodes": NODES, "gpus": GPUS, "cpus": CPUS}
    (home / "state").mkdir()
    for name in NODES:
        (home / f"spool-{name}").mkdir()
    for number in range(GPUS):
        (home / f"gpu{number}").symlink_to("/dev/null")
    (home / "slurm.conf").write_text(SLURM_CONF.format(ports=_free_ports(3), **values))
    (home / "gres.conf").write_text(GRES_CONF.format(last=GPUS - 1, **values))
    (home / "cgroup.conf").write_text(CGROUP_CONF)
    key = home / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))


def _start_munged(home: Path) -> None:
    places = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
    where = [f"--{option}={home / name}" for option, name in {**places, "log-file": "munged.log"}.items()]
    subprocess.run(["munged", "--force", *where], check=True, capture_output=True)


def _stop(home: Path) -> None:
    """Stops every daemon by its pid file, the nodes first."""
    for name in (*NODES, "slurmctld", "munged"):
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            process = psutil.Process(int((home / f"{name}.pid").read_text()))
            process.terminate()
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(10)
            process.kill()


@pytest.fixture(scope="session")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster with both nodes idle, for the whole session."""
    missing = [name for name in ("munged", "slurmctld", "slurmd") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"starting a Slurm cluster needs root and the packages munge and slurm-wlm (missing: {missing})")
    home = tmp_path_factory.mktemp("slurm")
    home.chmod(0o755)
    _write_files(home)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(home / "slurm.conf")
    made = Slurm(home)
    try:
        _start_munged(home)
        subprocess.run(["slurmctld", "-f", str(home / "slurm.conf")], check=True)
        answers = ["scontrol", "ping"]
        made.until(
            lambda: not subprocess.run(answers, capture_output=True, check=False).returncode, "slurmctld answers"
        )
        for name in NODES:
            made.start_node(name)
        yield made
    finally:
        for process in made.tasks():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        _stop(home)
        os.environ.pop("SLURM_CONF")
        if before:
            os.environ["SLURM_CONF"] = before


@pytest.fixture
def slurm(daemons: Slurm) -> Iterator[Slurm]:
    """A cluster with both nodes idle at the start of the test; its jobs are cancelled at the end."""
    yield daemons
    for job in daemons.jobs():
        subprocess.run(["scancel", job], check=False)
    daemons.until(lambda: not daemons.jobs(), "the jobs have gone")
    for name in NODES:
        if not psutil.pid_exists(int((daemons.home / f"{name}.pid").read_text())):
            daemons.start_node(name)
