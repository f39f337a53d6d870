"""Networks cut from one fine-tuned network to the same number of MACs in different ways, each finished in the same way.

`python -m bench.pretrained.compare --data DIR --resolution 112 --teacher FILE --max-macs N [--run RUN ...] --out DIR`

The contenders are the winners of finished searches (RUN, a run folder), lower input resolution, uniform hidden width,
and FastNAS of NVIDIA Model Optimizer (pip install 'mfkd[peers]'), on images of full size and on smaller ones. All start
from the weights of the teacher, the fine-tuned uncut network, and have the same last training for each seed: the same
images, batches, distillation and epochs.

Each row is appended to DIR/rows.jsonl at once: run the same command again to resume, or with another --max-macs to add
rows. `python -m bench.pretrained.conclude DIR` reads them.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import fx, nn

from bench.pretrained import fastnas
from engine.config import SearchConfig, config_at
from engine.data.dataset import Split
from engine.data.loader import eval_batches
from engine.networks import count_cost
from engine.networks.plain import Downsample
from engine.networks.state_dict import read_state_dict
from engine.recipes import FINAL, default_config
from engine.run_folder import RunFolder
from engine.search.journal import read_journal
from engine.space import SearchSpace
from engine.spaces.load import load_space
from engine.spaces.pretrained import SIDES
from engine.tasks import WorkerSettings
from engine.training import teacher as teachers
from engine.training.context import WorkerContext, open_context
from engine.training.inherit import calibration, inherited, recalibrate
from engine.training.student import prepare
from engine.training.teacher_cache import CachedTeacher
from engine.training.train import Stopwatch, train
from engine.training.weights import save_weights
from engine.trial import Architecture, Fidelity, UsageError, fidelity_to_json

Json = dict[str, Any]
ROWS = "rows.jsonl"
TEACHER, OURS, FASTNAS = "fine-tuned, uncut", "our search", ("FastNAS", "FastNAS on smaller images")
TEACHER_OUTPUTS = 2**30  # bytes of the teacher's outputs, which all trainings of a seed share


@dataclass(frozen=True, eq=False)
class Case:
    """What all contenders share: settings and data, the fine-tuned network (`digest` tells its weights from others),
    the cap on MACs, and the last training."""

    context: WorkerContext
    teacher: CachedTeacher
    digest: str
    space: SearchSpace
    max_macs: float
    final: Fidelity
    folder: Path

    @property
    def settings(self) -> Json:
        """What all rows of a folder must agree in."""
        return {"teacher": self.digest, "final": fidelity_to_json(self.final)}

    @property
    def network(self) -> fx.GraphModule:
        assert isinstance(self.teacher.network, fx.GraphModule)
        return self.teacher.network

    def member(self, architecture: Architecture) -> nn.Module:
        """A member of the space with weights inherited from the fine-tuned network."""
        return inherited(self.context, architecture, self.network)


@dataclass(frozen=True)
class Contender:
    """A network before its last training, in words and as a function that makes it. `seconds` is how long it took to
    find."""

    network: str
    make: Callable[[], nn.Module]
    seconds: float = 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="as in search")
    parser.add_argument("--resolution", type=int, default=0, help="as in search")
    parser.add_argument("--teacher", type=Path, required=True, help="weights file of the fine-tuned uncut network")
    parser.add_argument("--max-macs", type=float, required=True)
    parser.add_argument("--run", type=Path, nargs="+", default=[], help="finished searches of different seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the last trainings, without --run")
    parser.add_argument("--epochs", type=int, default=0, help="of the last training; 0: those of the recipe")
    parser.add_argument("--only", nargs="+", default=[], help="contenders to train; by default all")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    runs = {run.read_config()["config"]["seed"]: run for run in (RunFolder(path.absolute()) for path in given.run)}
    if len(runs) < len(given.run):
        raise UsageError("--run: give searches of different seeds")
    measure(open_case(given), runs, list(runs) or given.seeds, given.only)


def open_case(given: argparse.Namespace) -> Case:
    card = teachers.read_card(given.teacher)
    space = load_space(card.network.partition("#")[0])
    if space.inherit is None:
        raise UsageError(f"--teacher {given.teacher}: {card.network} is no member of a pretrained space")
    config = default_config(SearchConfig(space=space.name))
    config = dataclasses.replace(config, data=given.data, resolution=given.resolution, teacher=str(given.teacher))
    context = open_context(WorkerSettings(config, given.out.absolute(), "cpu"))
    teachers.check_fits(card, context.data.classes)
    if (card.mean, card.std, card.resolution) != (context.data.mean, context.data.std, context.data.resolution):
        raise UsageError(f"--teacher {given.teacher} was not fine-tuned on {given.data} at this --resolution")
    teacher = CachedTeacher(teachers.freeze(teachers.load(given.teacher), context.device), TEACHER_OUTPUTS)
    high = context.config.high
    final = dataclasses.replace(high, name="final", epochs=given.epochs or round(FINAL["finetune"] * high.epochs))
    given.out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(given.teacher.read_bytes()).hexdigest()[:8]
    return Case(context, teacher, digest, space, given.max_macs, final, given.out)


def measure(case: Case, runs: Mapping[int, RunFolder], seeds: Sequence[int], only: Sequence[str]) -> None:
    """Appends the rows that are missing."""
    path = case.folder / ROWS
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if any({key: row[key] for key in case.settings} != case.settings for row in rows):
        raise UsageError(f"--out {case.folder} holds rows of another teacher or last training; choose another folder")
    done = {(row["name"], row["max_macs"], row["seed"]) for row in rows}
    names = (TEACHER, *([OURS] if runs else []), *case.space.families, *FASTNAS)
    for name, seed in product([name for name in names if not only or name in only], seeds):
        if (name, case.max_macs, seed) in done:
            continue
        contender = find(case, name, runs[seed] if name == OURS else None)
        if contender is None:
            print(f"{name}: found no network of at most {case.max_macs:g} MACs", flush=True)
            continue
        row = {"name": name, "max_macs": case.max_macs, "seed": seed, **case.settings}
        row |= finish(case, contender, seed, name != TEACHER)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({key: value for key, value in row.items() if key not in ("hits", *case.settings)}, flush=True)


@lru_cache(maxsize=16)
def find(case: Case, name: str, run: RunFolder | None) -> Contender | None:
    """A contender; None if no network of its kind is found within the cap."""
    if name == TEACHER:
        return Contender("", lambda: case.network)
    if run is not None:
        return winner(case, run)
    return fastnas_subnet(case, name) if name in FASTNAS else member_of_family(case, name)


def finish(case: Case, contender: Contender, seed: int, to_train: bool) -> Json:
    """The last training of a contender, and what it gets right on the test part."""
    context, config, start = case.context, case.context.config, time.perf_counter()
    torch.manual_seed(seed)
    network = contender.make()
    if to_train:
        side = context.resolution(case.final)
        settings = config_at(config, case.final)
        example = torch.zeros(2, 3, side, side).contiguous(memory_format=torch.channels_last)
        average = config.ema_decay > 0
        student = prepare(
            network, case.teacher.network, settings, case.final.kd_loss, example, seed=seed, average=average
        )
        train([student], case.teacher, context.train_batches(case.final, seed), config, Stopwatch())
        if student.status != "ok":
            raise RuntimeError(f"the last training of {contender.network} failed: {student.error}")
    hits = correct(context, network)
    macs, params = count_cost(network, context.data.resolution)
    return {
        "network": contender.network,
        "macs": macs,
        "params": params,
        "search_seconds": round(contender.seconds, 1),
        "epochs": case.final.epochs if to_train else 0,
        "train_seconds": round(time.perf_counter() - start, 1),
        "test_accuracy": hits.count("1") / len(hits),
        "hits": hits,
    }


@torch.no_grad()
def correct(context: WorkerContext, network: nn.Module) -> str:
    """A digit for each test image: 1 if it is classified right, else 0."""
    images, labels = loaded(context, context.data.test)
    network.eval()
    found = [network(some)[0].argmax(1) for some in images.split(fastnas.SCORED_AT_ONCE)]
    return "".join(str(int(hit)) for hit in torch.cat(found) == labels)


def loaded(context: WorkerContext, split: Split) -> fastnas.Labelled:
    """All images of a split (N, 3, R, R), as they are scored, and their labels (N,)."""
    batches = eval_batches(
        split,
        data=context.data,
        batch_size=min(len(split), fastnas.SCORED_AT_ONCE),
        resolution=context.data.resolution,
        backend=context.config.data_backend,
    )
    pairs = [(batch.images.clone(), batch.labels.clone()) for batch in batches]
    return torch.cat([images for images, _ in pairs]), torch.cat([labels for _, labels in pairs])


def busy(run: RunFolder) -> float:
    """Seconds that the workers of a search spent on its evaluations."""
    return sum(evaluation.seconds for evaluation in read_journal(run.journal).answers.values())


def winner(case: Case, run: RunFolder) -> Contender:
    """The winner of a finished search."""
    if not run.result.exists():
        raise UsageError(f"--run {run}: this search is not finished")
    architecture = Architecture.parse(json.loads(run.result.read_text())["winner"]["architecture"])
    space = run.read_config()["config"]["space"]
    if space != case.space.name or macs_of(case, [architecture.choices])[0] > case.max_macs:
        raise UsageError(f"--run {run}: its winner is not in {case.space.name} within {case.max_macs:g} MACs")
    return Contender(str(architecture), partial(case.member, architecture), busy(run))


def macs_of(case: Case, choices: Any) -> Any:
    """MACs (n,) of members (n, d) of the space."""
    assert case.space.cost is not None
    classes, resolution = len(case.context.data.classes), case.context.data.resolution
    return case.space.cost(np.asarray(choices, dtype=np.int8), classes, 1.0, resolution)[0]


def member_of_family(case: Case, family: str) -> Contender | None:
    """Of the members with most MACs within the cap at each input size, the most accurate on the validation part before
    any training. None if all have more."""
    start, choices = time.perf_counter(), case.space.families[family]
    macs = macs_of(case, choices)
    order = np.argsort(macs)[: int((macs <= case.max_macs).sum())]
    largest = {row[0]: Architecture(tuple(row)) for row in choices[order].tolist()}  # later ones replace smaller ones
    if not largest:
        return None
    valid = case.context.data.valid
    scored = {one: case.context.accuracy(case.member(one), valid, case.final) for one in largest.values()}
    best = max(scored, key=scored.__getitem__)
    return Contender(str(best), partial(case.member, best), time.perf_counter() - start)


def fastnas_subnet(case: Case, name: str) -> Contender | None:
    """The subnet that FastNAS finds; kept in the folder, since its search takes long.

    The smaller images have the size that alone would take half of the cut in MACs, on a logarithmic scale.
    """
    context, cut = case.context, case.max_macs / count_cost(case.network, case.context.data.resolution)[0]
    side = 1.0 if name == FASTNAS[0] else min(SIDES, key=lambda side: abs(math.log(side) - math.log(cut) / 4))
    path = case.folder / f"fastnas-{case.digest}-{case.max_macs:.0f}-{side}.safetensors"
    batches = calibration(context)
    if not path.exists():
        start, resize, (valid, labels) = time.perf_counter(), Downsample(side), loaded(context, context.data.valid)
        small = tuple(map(resize, batches))
        found = fastnas.search(case.network, case.max_macs, small, (resize(valid), labels))
        seconds = time.perf_counter() - start
        if found is None:
            return None
        save_weights(path, fastnas.rebuilt(case.network, found, side), {"seconds": str(seconds)})
    with safe_open(path, "pt") as stored:
        seconds = float(stored.metadata()["seconds"])
    weights = read_state_dict(path)

    def make() -> nn.Module:
        network = fastnas.rebuilt(case.network, weights, side).requires_grad_(True)
        recalibrate(network, batches)
        return network

    return Contender(f"side {side}, {fastnas.widths(make())}", make, seconds)


if __name__ == "__main__":
    main()
