"""Searches in pretrained spaces against their peers: test accuracies under the same cap on MACs.

`python -m bench.pretrained.compare RUN [RUN ...] --out FOLDER`

RUN is the folder of a finished search, which has trained its winner, lower input resolution and uniform hidden width to
the end. FastNAS of NVIDIA Model Optimizer (pip install 'mfkd[peers]') is added here, on images of full size and on
smaller ones. It prunes the teacher of the run to the cap of the run. Its subnet keeps the weights, and is trained to
the end as the winner was: same images, batches, distillation, epochs and seed.

Rows are appended to FOLDER/rows.jsonl at once: run the same command again to resume, or name further runs to add rows.
`python -m bench.pretrained.conclude FOLDER` reads them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import fx, nn

from bench.pretrained import fastnas
from engine.config import Resources, config_at, parse_bytes
from engine.data.dataset import Split
from engine.networks import count_cost
from engine.networks.plain import Downsample
from engine.networks.state_dict import read_state_dict
from engine.search import proxies
from engine.search.runs import Run, open_run
from engine.spaces.pretrained import SIDES
from engine.tasks import WorkerSettings
from engine.training.context import WorkerContext, open_context
from engine.training.evaluate import load_teacher
from engine.training.inherit import calibration, recalibrate
from engine.training.student import prepare
from engine.training.teacher_cache import CachedTeacher
from engine.training.train import Stopwatch, train
from engine.training.weights import save_weights
from engine.trial import Evaluation, UsageError, hits_to_text

Json = dict[str, Any]
ROWS = "rows.jsonl"
TEACHER, OURS, FASTNAS, FASTNAS_SMALLER = "fine-tuned, uncut", "our search", "FastNAS", "FastNAS on smaller images"


@dataclass(frozen=True, eq=False)
class Case:
    """A finished search, the evaluation of its winner trained to the end, and what is needed to train others so."""

    run: Run
    winner: Evaluation
    context: WorkerContext
    teacher: CachedTeacher

    @property
    def network(self) -> fx.GraphModule:
        """The uncut network, fine-tuned."""
        if not isinstance(self.teacher.network, fx.GraphModule):
            raise UsageError(f"{self.run.folder}: FastNAS needs a teacher that was made on the data of the run")
        return self.teacher.network

    @property
    def side(self) -> int:
        return self.context.data.resolution


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of finished searches, or names under runs/")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for run in [open_run(name) for name in given.runs]:
        compare(open_case(run), given.out)


def open_case(run: Run) -> Case:
    if not (run.result and run.result.get("final")):
        raise UsageError(f"{run.folder} has no finished winner; run its search again with --final-training always")
    context = open_context(WorkerSettings(run.config, run.folder.path, "cpu"))
    teacher = load_teacher(run.folder.teacher_weights(run.config), context)
    teacher.budget = parse_bytes("teacher-cache", Resources().teacher_cache)
    return Case(run, finished(run, run.result["final"]["architecture"]), context, teacher)


def finished(run: Run, architecture: str) -> Evaluation:
    """The evaluation of an architecture that was trained to the end."""
    answers = [answer for answer in run.record.answers.values() if answer.ok and answer.trial.fidelity.with_valid]
    return next(answer for answer in answers if str(answer.trial.architecture) == architecture)


def compare(case: Case, folder: Path) -> None:
    """Appends the rows of a run that are missing."""
    path, run = folder / ROWS, case.run
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {row["name"] for row in rows if row["run"] == str(run.folder)}
    for name, find in contenders(case, folder).items():
        if name in done:
            continue
        found = find()
        if found is None:
            print(f"{run.folder}: {name} finds no network of at most {run.config.max_macs:g} MACs", flush=True)
            continue
        about = {"run": str(run.folder), "name": name, "max_macs": run.config.max_macs, "seed": run.config.seed}
        with path.open("a") as file:
            file.write(json.dumps(about | found) + "\n")
        print(about | {key: value for key, value in found.items() if key != "hits"}, flush=True)


def contenders(case: Case, folder: Path) -> dict[str, Callable[[], Json | None]]:
    """Functions that measure a row, by name; they return None if no network within the cap is found."""
    run = case.run
    assert run.result is not None
    spent = proxies.seconds(run.proxies) + sum(answer.seconds for answer in run.record.searched.answers.values())
    trained = [row for row in run.result["baselines"] if {"architecture", "test_accuracy"} <= row.keys()]
    return {
        TEACHER: lambda: measured(case, case.teacher.network, "", 0.0),
        OURS: lambda: recorded(case.winner, spent),
        **{row["name"]: partial(recorded, finished(run, row["architecture"]), 0.0) for row in trained},
        FASTNAS: lambda: fastnas_row(case, 1.0, folder),
        FASTNAS_SMALLER: lambda: fastnas_row(case, smaller(case), folder),
    }


def recorded(evaluation: Evaluation, spent: float) -> Json:
    """The row of a network that the search has trained to the end, and the worker seconds that it took to find."""
    return {
        "network": str(evaluation.trial.architecture),
        "macs": evaluation.macs,
        "params": evaluation.params,
        "seconds": round(spent, 1),
        "test_accuracy": evaluation.accuracy,
        "hits": evaluation.hits,
    }


def measured(case: Case, network: nn.Module, described: str, spent: float) -> Json:
    """The row of another network."""
    found = case.context.read_out(network, case.context.data.test, case.winner.trial.fidelity)
    macs, params = count_cost(network, case.side)
    return {
        "network": described,
        "macs": macs,
        "params": params,
        "seconds": round(spent, 1),
        "test_accuracy": found.accuracy,
        "hits": hits_to_text(found.hits.tolist()),
    }


def smaller(case: Case) -> float:
    """The share of the side of the images that alone would take half of the cut in MACs, on a logarithmic scale."""
    cut = case.run.config.max_macs / count_cost(case.network, case.side)[0]
    return min(SIDES, key=lambda side: abs(math.log(side) - math.log(cut) / 4))


def fastnas_row(case: Case, side: float, folder: Path) -> Json | None:
    """FastNAS on images of a share of the side. Its subnet is kept in the folder, because the search takes long."""
    path = folder / f"fastnas-{side}{str(case.run.folder).replace('/', '-')}.safetensors"
    if not path.exists() and not save_subnet(case, side, path):
        return None
    network = fastnas.rebuilt(case.network, read_state_dict(path), side).requires_grad_(True)
    recalibrate(network, calibration(case.context))
    finish(case, network)
    with safe_open(path, "pt") as stored:
        return measured(case, network, f"side {side}, {fastnas.widths(network)}", float(stored.metadata()["seconds"]))


def save_subnet(case: Case, side: float, path: Path) -> bool:
    """Saves the weights of the subnet that FastNAS finds, with the seconds that it took; False if it finds none."""
    start, resize = time.perf_counter(), Downsample(side)
    images, labels = loaded(case.context, case.context.data.valid)
    batches = tuple(map(resize, calibration(case.context)))
    found = fastnas.search(case.network, case.run.config.max_macs, batches, (resize(images), labels))
    if found is None:
        return False
    spent = {"seconds": str(time.perf_counter() - start)}
    save_weights(path, fastnas.rebuilt(case.network, found, side), spent)
    return True


def loaded(context: WorkerContext, split: Split) -> fastnas.Labelled:
    """All images of a split (N, 3, R, R), as they are scored, and their labels (N,)."""
    batches = [
        (batch.images.clone(), batch.labels.clone())  # the loader may reuse a batch's memory
        for batch in context.eval_batches(split, context.config.high)
    ]
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def finish(case: Case, network: nn.Module) -> None:
    """Trains a network as the winner was trained to the end."""
    context, trial = case.context, case.winner.trial
    config, teacher = context.config, case.teacher if trial.fidelity.kd_loss != "none" else None
    side = context.resolution(trial.fidelity)
    student = prepare(
        network,
        teacher.network if teacher is not None else None,
        config_at(config, trial.fidelity),
        trial.fidelity.kd_loss,
        torch.zeros(2, 3, side, side).contiguous(memory_format=torch.channels_last),
        seed=trial.seed,
        average=config.ema_decay > 0,
    )
    train([student], teacher, context.train_batches(trial.fidelity, trial.seed), config, Stopwatch())
    if student.status != "ok":
        raise RuntimeError(f"the last training failed: {student.error}")


if __name__ == "__main__":
    main()
