"""Latencies of another device: networks to be timed there, and what comes back."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine.config import Resources
from engine.fleet.drain import answer_of
from engine.fleet.fleet import submit
from engine.run_folder import write_atomically
from engine.search.latency.model import choose_probes, fit_model
from engine.search.latency.table import BuiltSpace, read_table
from engine.search.one_architecture import worker
from engine.search.progress import Display
from engine.space import candidates
from engine.tasks import ExportProbeTask
from engine.trial import UsageError
from surrogate.sums import LEAST_POINTS

Json = dict[str, Any]
SCRIPT = Path(__file__).parents[2] / "latency" / "time_probes.py"
MANIFEST, LATENCIES = "manifest.json", "latencies.json"


def export_probes(networks: BuiltSpace, batch: int, count: int, seed: int, out: Path, display: Display) -> Json:
    """Writes `count` networks of a space, a manifest and the script that times them, into a new or empty folder.

    The networks are ONNX files with zeros for weights, compressed. Raises UsageError if the folder holds anything.
    """
    if count < LEAST_POINTS:
        raise UsageError(f"--count is {count}; predictions take at least {LEAST_POINTS} networks")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder; give --out a new one")
    out.mkdir(parents=True, exist_ok=True)
    members = candidates(networks.space, networks.classes, networks.width, networks.resolution, seed)
    probes = choose_probes(networks, members, count, seed)
    classes, width, resolution = networks.classes, networks.width, networks.resolution
    with worker(Resources(device="cpu", workers=1), None, "engine.latency.probes") as (fleet, _):
        for place, architecture in enumerate(probes, 1):
            display.say(f"exporting {architecture} ({place} of {len(probes)})")
            task = ExportProbeTask(networks.spec, architecture, classes, width, resolution, out.absolute())
            answer_of(submit(fleet, task))
    shutil.copyfile(SCRIPT, out / SCRIPT.name)
    manifest = {"space": networks.spec, "classes": classes, "width": width, "resolution": resolution, "batch": batch}
    manifest |= {"seed": seed, "architectures": [*map(str, probes)]}
    write_atomically(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    display.say(f"copy {out} to the device and run there, with onnxruntime installed: python {SCRIPT.name}")
    return {"out": str(out.absolute()), "networks": len(probes), "script": SCRIPT.name}


def import_latencies(source: Path, device: str, out: Path) -> Json:
    """Reads the latencies that the script has written, checks how well others are predicted from them, and writes the
    file that a search takes; returns the accuracy on networks left out of the fit. UsageError if there are too few."""
    path = source / LATENCIES if source.is_dir() else source
    if not path.is_file():
        raise UsageError(f"no file {path}; run {SCRIPT.name} on the device first, and copy what it writes back")
    table = read_table(path)
    if len(table.milliseconds) < LEAST_POINTS:
        raise UsageError(f"{path} has {len(table.milliseconds)} networks; predictions take at least {LEAST_POINTS}")
    table = replace(table, device=device or table.device)
    found = fit_model(table.built_space(), table).accuracy
    table.write(out)
    facts = {name: value for name, value in asdict(table).items() if name != "milliseconds"}
    return {
        "out": str(out.absolute()),
        "networks": len(table.milliseconds),
        **facts,
        "median_error": round(found.median, 4),
        "margin": round(found.factor - 1, 4),
        "rank_correlation": round(found.rank_correlation, 4),
    }


def summary(found: Json) -> str:
    """An import in words."""
    return (
        f"{found['networks']} networks of {found['space']} on {found['device']} ({found['runtime']}, "
        f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}, batch size {found['batch']}); networks left "
        f"out are predicted with a median error of {100 * found['median_error']:.1f} %, 95 of 100 within "
        f"{100 * found['margin']:.0f} %, rank correlation {found['rank_correlation']:.3f}; search with: "
        f"--latency {found['out']} --max-latency-ms N"
    )
