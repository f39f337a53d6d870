"""Batch scripts: run by bash with fake scheduler commands, and compared with the documented syntax."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import cli
from engine.commands import submit as command
from engine.commands.flags import gather
from engine.config import Budget, Resources, SearchConfig
from engine.fleet.submit import DRAINED, Job, render
from engine.trial import UsageError

ASKED = Resources(gpus="8", time="24:00:00", cpus=64, partition="long", account="lab")
POD = Resources(gpus="8", cpus=64, memory_gb=300, image="mfkd:1", claim="work:/work", partition="lab")
SCRIPTED = ("slurm", "pbs", "lsf")


@pytest.fixture
def job(tmp_path: Path) -> Callable[[str], Job]:
    """A job whose search is a line of shell."""

    def made(shell: str) -> Job:
        return Job(
            arguments=("search", "--name=photos"),
            program=("bash", "-c", shell),
            folder=str(tmp_path),
            name="photos",
            script=f"{tmp_path}/job.sh",
            output=str(tmp_path),
            resources=ASKED,
            requeues=2,
        )

    return made


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.Popen[str]]:
    """Starts a script in a session of its own, as a scheduler does; scontrol and qsub record their arguments."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("scontrol", "qsub"):
        (tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")

    def begin(scheduler: str, job: Job, **environment: str) -> subprocess.Popen[str]:
        Path(job.script).write_text(render(scheduler, job))
        return subprocess.Popen(
            ["env", "--default-signal=INT", "bash", job.script],  # even if the tests' own shell ignores INT
            env={**os.environ, "SLURM_JOB_ID": "7", "LSB_JOBID": "7", **environment},
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def calls(folder: Path) -> str:
    """The recorded calls of the schedulers' commands."""
    record = folder / "calls"
    return record.read_text().strip() if record.exists() else ""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


@pytest.mark.parametrize("scheduler", SCRIPTED)
@pytest.mark.parametrize("code", [0, 3, 4, 137])
def test_a_search_that_is_done_ends_its_job(
    scheduler: str, code: int, job: Callable[[str], Job], start: Callable[..., Any], tmp_path: Path
) -> None:
    assert start(scheduler, job(f"exit {code}")).wait(60) == code
    assert calls(tmp_path) == ""


@pytest.mark.parametrize(
    ("environment", "number"),
    [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}, "5_3"), ({"SLURM_RESTART_COUNT": "1"}, "7")],
)
def test_slurm_requeues_a_drained_search(
    environment: dict[str, str],
    number: str,
    job: Callable[[str], Job],
    start: Callable[..., Any],
    tmp_path: Path,
) -> None:
    assert start("slurm", job(f"exit {DRAINED}"), **environment).wait(60) == DRAINED
    assert calls(tmp_path) == f"scontrol requeue {number}"


def test_pbs_submits_the_script_again_and_counts(
    job: Callable[[str], Job], start: Callable[..., Any], tmp_path: Path
) -> None:
    assert start("pbs", job(f"exit {DRAINED}"), MFKD_REQUEUES="1").wait(60) == DRAINED
    assert calls(tmp_path) == f"qsub -v MFKD_REQUEUES=2 {tmp_path}/job.sh"


def test_lsf_requeues_by_exit_code_a_limited_number_of_times(
    job: Callable[[str], Job], start: Callable[..., Any]
) -> None:
    drained = job(f"exit {DRAINED}")
    assert f'#BSUB -Q "{DRAINED}"' in render("lsf", drained)
    assert [start("lsf", drained).wait(60) for _ in range(3)] == [DRAINED, DRAINED, 1]
    assert start("lsf", drained, LSB_JOBID="8").wait(60) == DRAINED


@pytest.mark.parametrize(("scheduler", "count"), [("slurm", "SLURM_RESTART_COUNT"), ("pbs", "MFKD_REQUEUES")])
def test_the_number_of_requeues_is_limited(
    scheduler: str, count: str, job: Callable[[str], Job], start: Callable[..., Any], tmp_path: Path
) -> None:
    process = start(scheduler, job(f"exit {DRAINED}"), **{count: "2"})
    assert "submit the script again to resume" in process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert calls(tmp_path) == ""


DRAINS = "trap 'sleep 0.3; exit 75' USR1; trap 'sleep 0.3; exit 75' TERM; touch up; while :; do sleep 0.05; done"


@pytest.mark.parametrize("scheduler", SCRIPTED)
def test_the_warning_reaches_the_search_and_the_script_returns_its_code(
    scheduler: str, job: Callable[[str], Job], start: Callable[..., Any], tmp_path: Path
) -> None:
    """Slurm warns the script only; the search takes a while to drain."""
    process = start(scheduler, job(DRAINS))
    wait_for((tmp_path / "up").exists)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == DRAINED
    assert bool(calls(tmp_path)) == (scheduler != "lsf")  # LSF requeues by the exit code


@pytest.mark.parametrize("scheduler", SCRIPTED)
@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGINT, signal.SIGTERM]])
def test_a_cancelled_job_is_not_requeued(
    scheduler: str, numbers: list[int], job: Callable[[str], Job], start: Callable[..., Any], tmp_path: Path
) -> None:
    """The signals go to every process of the job, as Ctrl-C does, and the drained search exits with 75 as always."""
    process = start(scheduler, job(DRAINS))
    wait_for((tmp_path / "up").exists)
    for number in numbers:
        os.killpg(process.pid, number)
    assert process.wait(60) == 143
    assert calls(tmp_path) == ""


def test_worker_init_runs_before_the_search(job: Callable[[str], Job], start: Callable[..., Any]) -> None:
    asked = replace(ASKED, worker_init="export GREETING='hello there'")
    assert start("slurm", replace(job('[ "$GREETING" = "hello there" ]'), resources=asked)).wait(60) == 0


def directives(text: str, mark: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.startswith(mark)]
    code = text[text.index("\ncd ") :]
    assert mark not in code, "schedulers ignore directives after the first command"
    return [line.removeprefix(mark).strip() for line in lines]


def test_a_slurm_script_requests_all_resources(job: Callable[[str], Job]) -> None:
    """`make test-slurm` submits such scripts."""
    asked = replace(ASKED, qos="high", memory_gb=500, job_options="--constraint=h100 --mail-type=END", grace_s=120)
    lines = directives(render("slurm", replace(job("true"), resources=asked, nodes=4)), "#SBATCH")
    assert {
        "--nodes=4",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--cpus-per-task=64",
        "--mem=500G",
        "--time=24:00:00",
        "--partition=long",
        "--account=lab",
        "--qos=high",
        "--signal=B:USR1@150",
        "--requeue",
        "--no-kill",
        "--open-mode=append",
        "--constraint=h100 --mail-type=END",
    } <= set(lines)
    whole = directives(render("slurm", replace(job("true"), resources=replace(ASKED, cpus=0))), "#SBATCH")
    assert {"--exclusive", "--mem=0"} <= set(whole)


def test_pbs_directives_follow_the_manual(job: Callable[[str], Job]) -> None:
    """man qsub of PBS Professional; resources as `select` chunks, not mixed with the old -l nodes=."""
    text = render("pbs", replace(job("true"), resources=replace(ASKED, memory_gb=500, job_options="-m n")))
    lines = directives(text, "#PBS")
    assert all(re.match(r"-[NojlrqAm] \S+$", line) for line in lines)
    assert {"-l select=1:ncpus=64:ngpus=8:mem=500gb", "-l walltime=24:00:00", "-r y", "-q long", "-A lab"} <= set(lines)
    assert re.search(r"-N [A-Za-z0-9]\S{0,235}$", text, re.MULTILINE)
    assert f"--time-limit={24 * 3600 - 30}" in text  # PBS does not warn; this leaves time to requeue
    told = replace(ASKED, time_limit="none")
    assert "--time-limit" not in render("pbs", replace(job("true"), resources=told))


def test_lsf_directives_follow_the_manual(job: Callable[[str], Job]) -> None:
    """bsub of LSF 10.1: a warning action needs its time; -W is hours and minutes; the cores are on one host."""
    text = render("lsf", replace(job("true"), resources=replace(ASKED, time="1:59:30")))
    lines = directives(text, "#BSUB")
    options = {line.split()[0] for line in lines}
    assert options == {"-J", "-o", "-n", "-R", "-W", "-wa", "-r", "-Q", "-gpu", "-q", "-P"}
    assert {"-W 2:00", "-wa 'USR1' -wt '2'", '-gpu "num=8"', '-R "span[hosts=1]"', "-n 64"} <= set(lines)


def test_a_kubernetes_manifest_follows_the_api(job: Callable[[str], Job]) -> None:
    """batch/v1 Job with a pod failure policy (stable since 1.31)."""
    asked = replace(POD, grace_s=90)
    made = replace(job("true"), resources=asked, name="My photos_2", program=("mfkd",), requeues=5)
    manifest = yaml.safe_load(render("kubernetes", made))
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "Job")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", manifest["metadata"]["name"])
    assert manifest["metadata"]["namespace"] == "lab"
    spec = manifest["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["backoffLimit"] == 5
    assert pod["restartPolicy"] == "Never", "a pod failure policy requires it"
    assert pod["terminationGracePeriodSeconds"] > 90
    fails, ignores = spec["podFailurePolicy"]["rules"]
    assert fails["action"] == "FailJob"
    assert fails["onExitCodes"]["containerName"] == container["name"]
    assert 0 not in fails["onExitCodes"]["values"]
    assert DRAINED not in fails["onExitCodes"]["values"]
    assert ignores == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert container["command"] == ["mfkd", "search", "--name=photos"]
    assert container["resources"]["limits"] == {"cpu": "64", "memory": "300Gi", "nvidia.com/gpu": "8"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["workingDir"] == "/work"


@pytest.mark.parametrize(
    ("scheduler", "change", "message"),
    [
        ("slurm", {"time": ""}, "slurm requires --time"),
        ("slurm", {"gpus": "auto"}, "say how many GPUs"),
        ("slurm", {"image": "mfkd:1"}, "slurm does not support --image"),
        ("slurm", {"time": "00:02:59"}, "the job is warned 90 s before its time limit"),
        ("pbs", {"cpus": 0}, "pbs requires --cpus"),
        ("pbs", {"qos": "high"}, "pbs does not support --qos: use --job-options"),
        ("lsf", {"memory_gb": 4}, "the unit of its -M depends on the site"),
        ("kubernetes", {}, "kubernetes does not support --account"),
        ("kubernetes", {"account": "", "time": "", "memory_gb": 4, "image": "x"}, "kubernetes requires --claim"),
    ],
)
def test_jobs_that_a_scheduler_cannot_run_are_refused(
    scheduler: str, change: dict[str, Any], message: str, job: Callable[[str], Job]
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        render(scheduler, replace(job("true"), resources=replace(ASKED, **change)))


@pytest.mark.parametrize("scheduler", ["pbs", "lsf"])
def test_several_nodes_require_slurm(scheduler: str, job: Callable[[str], Job]) -> None:
    with pytest.raises(UsageError, match=f"--executor {scheduler} --max-nodes 3"):
        render(scheduler, replace(job("true"), nodes=3))


FLAGS = [
    "--log=tensorboard",
    "--compile=true",
    "--data=my photos",
    "--low.fraction=1/27",
    "--high.epochs=7",
    "--lr=1e-3",
    "--max-macs=60e6",
    "--gpus=8",
]


@pytest.mark.parametrize("arguments", [["--space=nasbench201"], ["--data=glyphs"], ["--max-low=50"], []])
def test_a_job_of_defaults_is_that_search_and_not_the_demo(arguments: list[str]) -> None:
    """Only without any search flags is it the demo."""
    _, asked = cli.parse(["submit", "slurm", "--gpus=8", "--time=1:00:00", *arguments])
    _, got = cli.parse(command.search_arguments(asked))
    assert gather(SearchConfig, got) == gather(SearchConfig, asked)
    assert gather(Budget, got) == gather(Budget, asked)
    assert (gather(SearchConfig, got) == SearchConfig()) == bool(arguments)


def test_the_job_runs_the_search_that_the_flags_describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags and the settings of a YAML file become equivalent flags; those of the job are left out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("low: {epochs: 9}\nseed: 5\n")
    arguments = ["-c", "mine.yaml", *FLAGS, "--time=1:00:00", "--partition=long"]
    _, asked = cli.parse(["submit", "slurm", *arguments])
    arguments = command.search_arguments(asked)
    _, got = cli.parse(arguments)
    assert gather(SearchConfig, got) == gather(SearchConfig, asked)
    assert got.log == "tensorboard"
    assert gather(Budget, got) == gather(Budget, asked)
    assert gather(Resources, got) == replace(gather(Resources, asked), time="", partition="")
    assert not {"--time", "--partition", "--config"} & {argument.split("=")[0] for argument in arguments}


def submit(*arguments: str) -> int:
    return cli.main(["submit", "slurm", "--data=glyphs:144", "--gpus=8", "--time=1:00:00", "--name=mine", *arguments])


def test_submit_writes_a_script_and_submits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/given\necho 41\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert submit() == 0
    script = tmp_path / "runs" / "mine" / "slurm.sh"
    assert json.loads(capsys.readouterr().out) == {"scheduler": "slurm", "script": str(script)}
    assert not (tmp_path / "given").exists()
    assert submit("--go") == 0
    assert json.loads(capsys.readouterr().out)["job"] == "41"
    assert (tmp_path / "given").read_text().split() == ["--parsable", str(script)]
    sbatch.write_text("#!/bin/sh\necho 'invalid partition specified: gpu' >&2\nexit 1\n")
    assert submit("--go") == 3
    assert "sbatch refused" in (err := capsys.readouterr().err)
    assert "invalid partition specified: gpu" in err


def test_the_data_of_a_pod_are_not_looked_for_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data=photos", "--gpus=8", "--cpus=64", "--memory-gb=400", "--image=mfkd:1", "--claim=work:/work"]
    assert cli.main(["submit", "kubernetes", *words]) == 0
    assert "--data photos was not checked: only pods see the volume work:/work" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--nodes=0"], 2, "--nodes is 0; it must be at least 1"),
        (["--time=90"], 2, "write HH:MM:SS"),
        (["--batch-size=-1"], 2, "--batch-size is -1"),
        (["--executor=slurm"], 2, "submit does not accept --executor: the search runs on the nodes of its own job"),
        (["--max-nodes=2"], 2, "submit does not accept --max-nodes: --nodes sets"),
        (["--dry-run"], 2, "submit does not accept --dry-run"),
        (["--run-dir=my run"], 2, "choose another --run-dir"),
        (["--data=photos"], 3, "--data photos: no such file or folder"),
        (["--teacher=t.safetensors"], 2, "if only the nodes have it, add --no-check"),
        (["--data=photos", "--no-check", "--go"], 3, "no sbatch here"),
        (["--go"], 3, "no sbatch here"),
    ],
)
def test_wrong_jobs_are_refused_before_they_are_submitted(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    try:
        got = submit(*arguments)
    except SystemExit as stop:
        got = stop.code  # type: ignore[assignment]
    assert got == code
    assert message in capsys.readouterr().err
