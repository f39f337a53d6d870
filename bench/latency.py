"""How well the latency of networks is predicted from 40 that were timed: onnxruntime, one thread, held-out networks.

`python -m bench.latency [--held-out 40] [--out FILE]` times members of two spaces twice and writes what it has found;
exported networks are kept in build/latency, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.latency.runtimes import compressed_onnx
from engine.latency.time_probes import Call, device_name, noise, open_network, quietest, time_in_rounds
from engine.search.latency.model import PROBES, choose_probes, fit_model
from engine.search.latency.table import BuiltSpace, LatencyTable
from engine.space import candidates
from engine.trial import Architecture
from surrogate.sums import Accuracy, accuracy

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench" / "results" / "cpu-amd-epyc" / "latency.json"
SPACES, CLASSES, RESOLUTION, WIDTH = ("nasbench201", "mobilenetv2"), 100, 32, 1.0
SHAPE = (1, 3, RESOLUTION, RESOLUTION)


def exported(networks: BuiltSpace, architecture: Architecture) -> bytes:
    """The compressed ONNX file of a member, from the cache if it has been exported before."""
    path = ROOT / "build" / "latency" / networks.spec / f"{architecture}.onnx.gz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        built = networks.space.build(architecture.choices, networks.classes, networks.width)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(compressed_onnx(built, networks.resolution))
        temporary.replace(path)
        print(f"exported {networks.spec} {architecture}", flush=True)
    return path.read_bytes()


def opened(networks: BuiltSpace, architecture: Architecture) -> Call:
    return open_network(gzip.decompress(exported(networks, architecture)), SHAPE)


def measure(spec: str, held_out: int) -> dict[str, Any]:
    """Times probes and held-out members in the same rounds, twice; predicts the latter from the former."""
    networks = BuiltSpace(spec, CLASSES, WIDTH, RESOLUTION)
    members = candidates(networks.space, CLASSES, WIDTH, RESOLUTION)
    probes = choose_probes(networks, members, PROBES, seed=0)
    rows = np.random.default_rng(1).permutation(len(members))
    others = [one for one in map(members.architecture, map(int, rows[: 2 * held_out])) if one not in set(probes)]
    asked = [*probes, *others[:held_out]]
    for architecture in asked:
        exported(networks, architecture)
    prepare = [partial(opened, networks, architecture) for architecture in asked]
    first, second = (time_in_rounds(prepare, say=partial(print, spec, flush=True)) for _ in range(2))
    ms, again = (np.array([quietest(rounds) for rounds in run]) for run in (first, second))
    table = LatencyTable(dict(zip(map(str, probes), ms.tolist(), strict=False)))
    model = fit_model(networks, table)
    tested = networks.members(asked[len(probes) :])
    taken = dict(zip(map(str, asked), ms.tolist(), strict=True))
    measured = np.array([taken[str(tested.architecture(row))] for row in range(len(tested))])
    return {
        "probes": len(probes),
        "held_out": len(measured),
        "milliseconds": [round(float(measured.min()), 3), round(float(measured.max()), 3)],
        "predicted": rounded(accuracy(model.predict(tested), measured)),
        "cross_validated": rounded(model.accuracy),
        "repeat_median_difference": round(float(np.median(np.abs(again / ms - 1))), 4),
        "noise": [round(noise(first), 4), round(noise(second), 4)],
        "load": round(os.getloadavg()[0], 1),
    }


def rounded(found: Accuracy) -> dict[str, float]:
    return {
        "median_error": round(found.median, 4),
        "95_of_100_within": round(found.factor - 1, 4),
        "rank_correlation": round(found.rank_correlation, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--held-out", type=int, default=40, help="members to predict, of each space")
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), help="spaces to measure")
    parser.add_argument("--out", type=Path, default=OUT, help="file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    found |= {"device": device_name(), "cores": os.cpu_count(), "threads": 1, "batch": 1, "resolution": RESOLUTION}
    found["onnxruntime"] = version("onnxruntime")
    for spec in arguments.spaces:
        found[spec] = measure(spec, arguments.held_out)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
        print(spec, json.dumps(found[spec]), flush=True)


if __name__ == "__main__":
    main()
