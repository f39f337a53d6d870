"""A worker process: reads tasks from one pipe and writes answers to another, as JSON lines, until the first closes.

engine/fleet/supervisor.py starts it as `python -m engine.fleet.worker TASKS ANSWERS PARENT MODULE`: two file
descriptors, the process id of the supervisor, and the module whose functions are the tasks (engine.training.run_tasks).
`worker_environment` there lists its environment variables.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.fleet.processes import die_with, leave_signals_to_the_driver
from engine.trial import EngineError

OOM_SCORE = 500  # out of memory, the kernel kills this process and not its supervisor, which reports it


def main(arguments: list[str]) -> None:
    """Serves until the supervisor closes the pipe of tasks."""
    tasks, answers, parent = map(int, arguments[:3])
    leave_signals_to_the_driver()
    die_with(parent)
    for descriptor in (tasks, answers):
        os.set_inheritable(descriptor, False)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()  # on a crash, and on the ABRT that ends a hang, the stacks go to the log
    module = importlib.import_module(arguments[3])
    with open(tasks, "rb") as questions, open(answers, "wb", buffering=0) as replies:
        for line in questions:
            question = json.loads(line)
            replies.write(b'{"started":true}\n')
            replies.write(answer(module, question["name"], question["task"]))


def answer(module: ModuleType, name: str, task: dict[str, Any]) -> bytes:
    """The line that answers a task: its result, or the kind and the text of its error."""
    try:
        return _line({"result": getattr(module, name)(task)})
    except EngineError as error:
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == EngineError.__module__)
        return _line({"error": kind.__name__, "text": str(error)})
    except Exception:
        return _line({"error": "TaskFailed", "text": traceback.format_exc()})


def _line(reply: dict[str, Any]) -> bytes:
    return json.dumps(reply).encode() + b"\n"


if __name__ == "__main__":
    main(sys.argv[1:])
