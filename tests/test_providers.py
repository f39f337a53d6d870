"""The jobs submitted for workers, and where workers run. tests/slurm does this on a real Slurm."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import Resources
from engine.fleet import providers
from engine.fleet.devices import Layout, layout
from engine.fleet.fleet import open_fleet
from engine.trial import EnvironmentUnusable, UsageError

JOBS: dict[str, Any] = {"gpus": "8", "time": "04:00:00", "cpus": 64, "partition": "long", "account": "lab"}
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts commands on the PATH that record their arguments and stdin, print a line and exit with a code."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name: str, output: str = "", code: int = 0) -> Path:
        given = tmp_path / f"{name}.given"
        lines = [
            "#!/bin/bash",
            f'echo "$*" >> {given}',
            f"[ -t 0 ] || cat >> {given}",
            f'echo "{output}" >&{2 if code else 1}',
        ]
        (folder / name).write_text("\n".join([*lines, f"exit {code}\n"]))
        (folder / name).chmod(0o755)
        return given

    return make


def submitted(resources: Resources, folder: Path) -> str:
    """The script of a job of workers."""
    site = providers.site(resources, layout(resources), "export ENVIRONMENT=ours")
    site.provider.script_dir = str(folder)
    assert site.provider.submit("start-a-pool --block_id=0", 1, "parsl.workers.block-0")
    (script,) = [path for path in folder.iterdir() if path.is_file() and "start-a-pool" in path.read_text()]
    subprocess.run(["bash", "-n", str(script)], check=True)
    return script.read_text()


def directives(text: str, mark: str) -> set[str]:
    return {line.removeprefix(mark).strip() for line in text.splitlines() if line.startswith(mark)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "scripts"
    made.mkdir()
    return made


def test_a_slurm_job_requests_the_resources(tools: Callable[..., Path], folder: Path) -> None:
    tools("sacct", code=1)
    tools("sbatch", "Submitted batch job 12")
    tools("scancel")
    asked = Resources(
        executor="slurm", **JOBS, qos="high", job_options="--constraint=h100", worker_init="module load x"
    )
    text = submitted(asked, folder)
    wanted = {"--nodes=1", "--gpus-per-node=8", "--cpus-per-task=64", "--time=240", "--partition=long"}
    assert wanted | {"--account=lab", "--qos=high", "--constraint=h100"} <= directives(text, "#SBATCH")
    assert re.search(r"ENVIRONMENT=ours\nmodule load x\n.*start-a-pool", text, re.DOTALL)


def test_a_pbs_job_requests_the_resources(tools: Callable[..., Path], folder: Path) -> None:
    given = tools("qsub", "31.server")
    tools("qdel")
    text = submitted(Resources(executor="pbs", **JOBS, memory_gb=500, job_options="-r y"), folder)
    wanted = {"-l select=1:ncpus=64:ngpus=8:mem=500gb", "-l walltime=04:00:00", "-r y"}
    assert wanted <= directives(text, "#PBS")
    assert "-q long" in directives(text, "#PBS") or "-q long" in given.read_text()


def test_an_lsf_job_requests_the_resources_and_is_read_from_stdin(tools: Callable[..., Path], folder: Path) -> None:
    given = tools("bsub", "Job <77> is submitted to queue <long>.")
    tools("bkill")
    text = submitted(Resources(executor="lsf", **JOBS), folder)
    wanted = {'-gpu "num=8"', "-n 64", '-R "span[ptile=64]"', "-W 240", "-q long", "-P lab"}
    assert wanted <= directives(text, "#BSUB")
    assert "start-a-pool" in given.read_text()


@pytest.mark.parametrize(("executor", "cancel"), [("slurm", "scancel"), ("pbs", "qdel"), ("lsf", "bkill")])
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_jobs_are_cancelled_however_the_driver_ends(
    executor: str, cancel: str, end: str, tools: Callable[..., Path], folder: Path
) -> None:
    tools("sacct", code=1)
    tools("sbatch", "Submitted batch job 12")
    tools("qsub", "12")
    tools("bsub", "Job <12> is submitted to queue <long>.")
    given = tools(cancel)
    driver = f"""
        import os, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        from engine.config import Resources
        from engine.fleet.devices import layout
        from engine.fleet.providers import site
        asked = Resources(executor={executor!r}, **{JOBS!r})
        provider = site(asked, layout(asked), "").provider
        provider.script_dir = {str(folder)!r}
        assert provider.submit("true", 1, "block-0") == "12"
        if {end!r} == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(driver)], check=False)
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0)
    deadline = time.monotonic() + 60
    while not given.exists() or "12" not in given.read_text():
        assert time.monotonic() < deadline, "the job was not cancelled"
        time.sleep(0.05)


def test_jobs_that_the_scheduler_refuses_end_the_search(tools: Callable[..., Path], tmp_path: Path) -> None:
    tools("sacct", code=1)
    given = tools("sbatch", "sbatch: error: invalid partition specified: long", code=1)
    tools("scancel")
    asked = Resources(executor="slurm", **JOBS)
    fleet = open_fleet(asked, layout(asked), tmp_path / "logs", module="tests.light")
    try:
        message = "^3 worker pools in a row ended before they connected: .*invalid partition specified: long"
        with pytest.raises(EnvironmentUnusable, match=message) as refused:
            fleet.submit("report", {}).result(timeout=60)
        assert str(refused.value).count("in a row") == 1
        with pytest.raises(EnvironmentUnusable, match=message):  # not sent to a scheduler that refuses every job
            fleet.submit("report", {}).result(timeout=60)
    finally:
        fleet.close()
    assert len(given.read_text().splitlines()) <= 6, "the scheduler was asked again and again"


def test_a_machine_outside_the_cluster_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for executor, command in (("slurm", "sbatch"), ("pbs", "qsub"), ("lsf", "bsub")):
        asked = Resources(executor=executor, **JOBS)  # type: ignore[arg-type]
        with pytest.raises(EnvironmentUnusable, match=f"no {command} here"):
            providers.site(asked, layout(asked), "")


def test_kubernetes_requires_its_client() -> None:
    asked = Resources(executor="kubernetes", gpus="8", cpus=64, memory_gb=300, image="mfkd:1", claim="work:/work")
    with pytest.raises(EnvironmentUnusable, match="pip install 'parsl.kubernetes.'"):
        providers.site(asked, layout(asked), "")


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (Resources(executor="slurm", gpus="8", max_nodes=4), Layout(32, (), "cuda", 1, 4)),
        (Resources(executor="slurm", gpus="4", workers=8, max_nodes=2), Layout(16, (), "cuda", 2, 2)),
        (Resources(executor="pbs", device="cpu", workers=16, max_nodes=3), Layout(48, nodes=3)),
    ],
)
def test_workers_are_counted_per_node(asked: Resources, wanted: Layout) -> None:
    assert layout(asked) == wanted


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Resources(executor="slurm"), "not visible from here; say how many GPUs"),
        (Resources(executor="slurm", device="cpu"), "give the number of --workers per node"),
        (Resources(executor="slurm", gpus="8", workers=12), "--workers 12 on 8 GPUs: give a multiple of 8"),
        (Resources(executor="slurm", gpus="8", workers=4), "give a multiple"),
    ],
)
def test_workers_that_cannot_be_counted_are_refused(asked: Resources, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        layout(asked)


def test_all_nodes_of_an_allocation_are_used(tools: Callable[..., Path], monkeypatch: Any) -> None:
    tools("srun")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert layout(Resources()) == Layout(6, (), "cuda", 1, 3)
    assert layout(Resources(device="cpu", workers=4)) == Layout(12, nodes=3)
    with pytest.raises(UsageError, match="give a count of GPUs per node"):
        layout(Resources(gpus="0,1"))
    assert not providers.local(Resources())
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert layout(Resources()) == Layout(2, ("0", "1"), "cuda")
    assert providers.local(Resources())


def test_a_given_address_overrides_the_host_name(tools: Callable[..., Path]) -> None:
    for name in ("sbatch", "scancel", "sacct"):
        tools(name)
    asked = Resources(executor="slurm", **JOBS, address="10.1.2.3")
    assert providers.site(asked, layout(asked), "").address == "10.1.2.3"
    assert providers.site(Resources(), Layout(2), "").address == "127.0.0.1"
