"""How much time is left before the scheduler ends the job that this process runs in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping

from engine.trial import UsageError

QUERY_LIMIT_S = 20


def remaining(asked: str, started: float, environment: Mapping[str, str] = os.environ) -> float | None:
    """Seconds left under `--time-limit`: auto asks the scheduler, a number counts from `started` (time.monotonic).

    None means no limit, or that the scheduler does not say.
    """
    if asked == "none":
        return None
    if asked == "auto":
        for variable, ask in (("SLURM_JOB_ID", _slurm), ("PBS_JOBID", _pbs), ("LSB_JOBID", _lsf)):
            if variable in environment:
                return ask(environment)
        return None
    try:
        seconds = float(asked)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise UsageError(f"--time-limit {asked}: write auto, none, or seconds from the start of the command")
    return seconds - (time.monotonic() - started)


def _slurm(environment: Mapping[str, str]) -> float | None:
    """Seconds left, from SLURM_JOB_END_TIME (seconds since 1970), or from squeue on versions that do not set it."""
    if end := environment.get("SLURM_JOB_END_TIME"):
        return float(end) - time.time()
    text = _output("squeue", "-h", "-j", environment["SLURM_JOB_ID"], "-o", "%e")
    return _until(text, "%Y-%m-%dT%H:%M:%S")


def _pbs(environment: Mapping[str, str]) -> float | None:
    """Seconds left, from the start and the wall time that `qstat -f` shows for the job."""
    try:
        (job,) = json.loads(_output("qstat", "-f", "-F", "json", environment["PBS_JOBID"]))["Jobs"].values()
        hours, minutes, seconds = map(int, job["Resource_List"]["walltime"].split(":"))
    except (ValueError, KeyError):
        return None
    start = _until(job.get("stime", ""), "%a %b %d %H:%M:%S %Y")
    return None if start is None else start + 3600 * hours + 60 * minutes + seconds


def _lsf(environment: Mapping[str, str]) -> float | None:
    """Seconds left, from the hours and minutes that `bjobs` shows as left."""
    left = re.match(r"(\d+):(\d+)", _output("bjobs", "-noheader", "-o", "time_left", environment["LSB_JOBID"]))
    return 3600.0 * int(left[1]) + 60.0 * int(left[2]) if left else None


def _until(text: str, form: str) -> float | None:
    """Seconds from now to a local time in a scheduler's format; None for other text (N/A, Unknown)."""
    try:
        return time.mktime(time.strptime(text.strip(), form)) - time.time()
    except ValueError:
        return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=QUERY_LIMIT_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
