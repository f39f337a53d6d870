"""Times the networks beside this file on this device: `python time_probes.py` writes latencies.json.

It needs only onnxruntime. Each network is timed in several rounds over all of them, so that a device that grows slower
or busier during the minutes that this takes slows all networks alike.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

ROUNDS, CALLS, WARM_UP_CALLS = 5, 15, 3
ROUND_LIMIT_S = 0.5  # of one network; slow ones are called less often
NOISY = 0.05

Call = Callable[[], float]  # runs a network once; returns milliseconds


def time_in_rounds(
    prepare: Sequence[Callable[[], Call]], rounds: int = ROUNDS, say: Callable[[str], None] = lambda line: None
) -> list[list[float]]:
    """Milliseconds of each network in each round: the median of CALLS calls, warmed up.

    `prepare` makes each network ready, once a round, so that only one is in memory at a time. Every other round goes
    through them backwards.
    """
    found: list[list[float]] = [[] for _ in prepare]
    for number in range(rounds):
        order = range(len(prepare)) if number % 2 == 0 else reversed(range(len(prepare)))
        for place in order:
            found[place].append(_median(prepare[place]()))
        say(f"round {number + 1} of {rounds}")
    return found


def _median(call: Call) -> float:
    for _ in range(WARM_UP_CALLS):
        call()
    times: list[float] = []
    while len(times) < CALLS and (len(times) < 3 or sum(times) < 1000 * ROUND_LIMIT_S):
        times.append(call())
    return statistics.median(times)


def quietest(rounds: Sequence[float]) -> float:
    """The latency of a network, from its rounds: the least, since other work on a machine only ever adds to it."""
    return min(rounds)


def noise(found: Sequence[Sequence[float]]) -> float:
    """By how much the middle round of a network is slower than its quietest one: the median over the networks."""
    return statistics.median(statistics.median(rounds) / min(rounds) - 1 for rounds in found)


def noise_warning(share: float) -> str:
    """What to say of a machine that is not quiet; empty if it is."""
    if share <= NOISY:
        return ""
    load = f", with a load of {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else ""
    return (
        f"this machine is not quiet: the same network takes {100 * share:.0f} % longer in one round than in another"
        f"{load}; stop other work, and measure again"
    )


def timed(run: Callable[[], object], threads: int = 1) -> Call:
    """A call of `run`, timed in milliseconds: of the one thread's processor time, which other work hardly affects,
    where the system measures that finely; else of elapsed time."""
    fine = threads == 1 and time.get_clock_info("thread_time").resolution <= 1e-6
    clock = time.thread_time if fine else time.perf_counter

    def call() -> float:
        start = clock()
        run()
        return (clock() - start) * 1000

    return call


def open_session(model: bytes | str, threads: int = 1) -> InferenceSession:
    """An ONNX file, or the content of one, opened by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def open_network(content: bytes, shape: Sequence[int], threads: int = 1) -> Call:
    """A network, as the content of an ONNX file, ready to be called by onnxruntime on the CPU with zeros."""
    import numpy as np

    session = open_session(content, threads)
    images = {session.get_inputs()[0].name: np.zeros(shape, dtype=np.float32)}
    return timed(lambda: session.run(None, images), threads)


def device_name() -> str:
    """What this device calls itself."""
    for path, key in (("/proc/device-tree/model", ""), ("/proc/cpuinfo", "model name")):
        if os.path.isfile(path):
            with open(path) as file:
                for line in file:
                    if line.startswith(key):
                        return line.split(":")[-1].strip("\0\n\t ")
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="threads of onnxruntime")
    parser.add_argument("--device", default=device_name(), help="name of this device (default: %(default)s)")
    parser.add_argument("--out", default="latencies.json", help="file to write")
    arguments = parser.parse_args()
    import onnxruntime

    folder = Path(__file__).resolve().parent
    manifest = json.loads((folder / "manifest.json").read_text())
    side, names = manifest["resolution"], manifest["architectures"]
    shape = (manifest["batch"], 3, side, side)

    def prepare(name: str) -> Call:
        content = gzip.decompress((folder / f"{name}.onnx.gz").read_bytes())
        return open_network(content, shape, arguments.threads)

    found = time_in_rounds([lambda name=name: prepare(name) for name in names], say=print)  # type: ignore[misc]
    result = {
        **{key: value for key, value in manifest.items() if key != "architectures"},
        "device": arguments.device,
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "threads": arguments.threads,
        "noise": round(noise(found), 4),
        "rounds": dict(zip(names, found)),  # noqa: B905 (Python 3.9 has no strict)
        "milliseconds": {name: quietest(rounds) for name, rounds in zip(names, found)},  # noqa: B905
    }
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.out}: {len(names)} networks on {arguments.device}")
    if noise_warning(result["noise"]):
        print(f"warning: {noise_warning(result['noise'])}", file=sys.stderr)


if __name__ == "__main__":
    main()
