"""A space of tiny networks, some of which misbehave, for tests of how a search handles that.

The environment variable `FAULTS` lists them as kind=option,...: members with that option as their first choice (* for
any) misbehave whenever they are built. `TRIAL_S` is how long building a network takes, in seconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from engine.space import Choice, FloatArray, IntMatrix, SearchSpace

WIDTHS = (4, 6, 8, 12)


def build(choices: tuple[int, ...], classes: int, width: float) -> Any:
    from torch import nn

    from engine.networks import Staged, conv_bn, pooled_classifier

    time.sleep(float(os.environ.get("TRIAL_S", "0")))
    for pair in filter(None, os.environ.get("FAULTS", "").split(",")):
        kind, option = pair.split("=")
        # The smallest and the largest are what a search tries a space with, before any trial.
        if len(set(choices)) > 1 and option in ("*", str(choices[0])):
            misbehave(kind)
    stages, c_in = [], 3
    for option in choices:
        stages.append(conv_bn(c_in, WIDTHS[option], 3, 2))
        c_in = WIDTHS[option]
    return Staged(nn.Identity(), stages, pooled_classifier(c_in, classes))


def misbehave(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "segfault":
        ctypes.string_at(0)
    if kind == "hang":
        Path(os.environ["RUN_OF_A_TEST"], "hangs").touch()
        time.sleep(1000)
    if kind == "memory":
        raise MemoryError("no memory for this network")
    if kind == "mistake":
        raise ValueError("this network cannot be built")


def cost(choices: IntMatrix, classes: int, width: float, resolution: int) -> tuple[FloatArray, FloatArray]:
    channels = np.array(WIDTHS)[choices].sum(1).astype(float)
    return 1000 * channels, channels


SPACE = SearchSpace(name="faulty", choices=(Choice("width", WIDTHS, ordinal=True),) * 3, build=build, cost=cost)
