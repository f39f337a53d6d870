"""What a search stands on before it asks anything: the space, the data as a worker finds them, the candidates, the
teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine import config
from engine.config import Budget, Plan, Resources, Study
from engine.fleet.devices import layout
from engine.fleet.fleet import Fleet, completed, open_fleet
from engine.search import journal, policy
from engine.search.progress import Display
from engine.search.speed import fast_enough
from engine.space import Candidates, SearchSpace, candidates, load_space
from engine.trial import Architecture, Trial, UsageError

Json = dict[str, Any]
# A network without operations still takes time per image (loading, normalisation, the classifier).
OVERHEAD_MACS = 1e6


@dataclass(frozen=True)
class Ground:
    """What a search stands on once data, teacher and space are known; `task` is what every task of a worker holds."""

    study: Study
    plan: Plan
    candidates: Candidates
    facts: Json
    run_dir: Path
    task: Json

    def cost(self, trial: Trial) -> float:
        """Expected price of a trial, up to a constant: passes over the data times MACs.

        It orders the virtual clock and is what policies see as seconds. Measured seconds would do that better, but
        differ between a run and its continuation elsewhere; decisions must not.
        """
        fidelity = trial.fidelity
        row = self.candidates.row(trial.architecture)
        macs = self.candidates.macs[row] if row is not None else float(np.median(self.candidates.macs))
        scale = fidelity.width * (fidelity.resolution or self.facts["resolution"]) / self.facts["resolution"]
        return fidelity.cost() * scale**2 * (macs + OVERHEAD_MACS)


def checked(study: Study, budget: Budget, resources: Resources) -> SearchSpace:
    """The space of a configuration that can work; UsageError for one that cannot, before anything is started."""
    config.check(study, budget, resources)
    if study.method not in policy.METHODS:
        raise UsageError(f"no method '{study.method}'; there are {', '.join(policy.METHODS)}")
    return load_space(study.space)


def prepare(
    study: Study, plan: Plan, space: SearchSpace, facts: Json, task: Json, fleet: Fleet, run_dir: Path, show: Display
) -> Ground:
    """Lists the candidates, and has the teacher trained or loaded; `facts` is what `probe` has found with `task`."""
    everything, fit = fitting(space, study, facts, show)
    if study.max_latency_ms < math.inf:
        fit = fast(fit, study, task, fleet, run_dir, show)
    if study.low.kd_loss != "none":
        path, pretrained = teacher_path(study, run_dir), config.ready_made(study.teacher)
        network = study.teacher if pretrained else f"{study.space}#{largest(everything)}"
        facts["teacher"] = obtain_teacher(network, pretrained, path, task, fleet, show)
    return Ground(study, replace(plan, valid_images=facts["images"]["valid"]), fit, facts, run_dir, task)


def probe(study: Study, task: Json, fleet: Fleet, show: Display) -> Json:
    """Has a worker check data and device; returns what it found."""
    facts: Json = completed(fleet, "run_probe", task)
    images, classes = facts["images"], len(facts["classes"])
    if images["train"] < study.batch_size:
        raise UsageError(f"--batch-size {study.batch_size}: there are {images['train']} training images; lower it")
    show.say(f"data {study.data}: {images['train']} train, {images['valid']} valid, {classes} classes")
    return facts


def fitting(space: SearchSpace, study: Study, facts: Json, show: Display) -> tuple[Candidates, Candidates]:
    """All members of the space, and those that meet the constraints: the candidates."""
    only = [space.check(Architecture.parse(word.strip())) for word in study.only.split(",") if word.strip()]
    taught = study.teacher == "auto" and study.low.kd_loss != "none"  # by the largest of all
    everything = members(space, study, facts, () if taught else only)
    named = members(space, study, facts, only) if only else everything
    inside = (named.macs >= study.min_macs) & (named.macs <= study.max_macs) & (named.params <= study.max_params)
    fit = named.where(inside)
    if not len(fit):
        raise UsageError(
            f"no architecture of {space.name} fits --max-macs {study.max_macs:g} and --max-params "
            f"{study.max_params:g} with --min-macs {study.min_macs:g}; the smallest has "
            f"{everything.macs.min():,.0f} MACs and {everything.params.min():,.0f} parameters"
        )
    show.say(
        f"space {space.name}: {space.size:,} architectures, {len(fit):,} candidates, "
        f"{fit.macs.min() / 1e6:.1f} to {fit.macs.max() / 1e6:.1f} million MACs"
    )
    return everything, fit


def members(space: SearchSpace, study: Study, facts: Json, only: Sequence[Architecture] = ()) -> Candidates:
    """All candidates of the space, or those of `only`, with their cost at full fidelity."""
    resolution = study.high.resolution or facts["resolution"]
    return candidates(space, len(facts["classes"]), study.high.width, resolution, study.seed, only)


def largest(everything: Candidates) -> Architecture:
    """The member with the most multiply-accumulates: the teacher of a run that is given none."""
    return everything.architecture(int(everything.macs.argmax()))


def fast(fit: Candidates, study: Study, task: Json, fleet: Fleet, run_dir: Path, show: Display) -> Candidates:
    """The candidates that meet the limit on latency, by what a worker measures before anything else is asked."""
    path = run_dir / "latency.json"

    def measure(sample: Sequence[Architecture]) -> list[float]:
        show.say(f"latency: measuring {len(sample)} architectures on a batch of {study.latency_batch}")
        chosen = [list(architecture.choices) for architecture in sample]
        taken: list[float] = completed(fleet, "run_latency", {**task, "architectures": chosen})
        return taken

    begun = bool(journal.read(run_dir / "journal.jsonl").asked)
    left, how = fast_enough(fit, study.max_latency_ms, path, begun, study.seed, measure)
    show.say(how)
    return left


def teacher_path(study: Study, run_dir: Path) -> Path:
    """The weights file that the study names, or the one that the run makes itself."""
    if study.teacher.endswith(".safetensors"):
        return Path(study.teacher).absolute()
    return run_dir / "teacher" / "teacher.safetensors"


def obtain_teacher(
    network: str, pretrained: bool, path: Path, task: Json, fleet: Fleet, show: Display
) -> Json:
    """The weights file at `path`: checked against the data if it is there, else made; what it says of itself."""
    show.say(f"teacher: {path if path.exists() else network}")
    whole = {**task, "path": str(path), "network": network, "pretrained": pretrained}
    card: Json = completed(fleet, "run_teacher", whole)
    show.say(f"teacher: {card['network']}, validation accuracy {card['accuracy']:.4f}, trained {card['seconds']:.0f} s")
    if card["elsewhere"]:
        show.say("teacher: trained on other images, or with another --seed: it may know some of this validation part")
    return card


def make_teacher(
    study: Study, arch: str, resources: Resources, path: Path, show: Display, given: Json, check: bool
) -> Json:
    """The `teacher` command: trains `arch` (auto, an architecture of the space, torchvision:NAME, timm:NAME,
    FILE.py:NAME) if `path` is not there, and checks the file against the data. With `given` (weights, mean, std) there
    is nothing to train; `check` takes whatever network the file holds, else another one than `arch` is a UsageError.
    """
    space = load_space(study.space)
    run_dir = path.absolute().parent
    fleet = open_fleet(resources, replace(layout(resources), workers=1, nodes=1), run_dir / "logs")
    try:
        task, there = task_for(study, resources, run_dir, fleet), path.exists()
        facts = probe(study, task, fleet, show)
        if arch == "auto":
            arch = str(largest(members(space, study, facts)))
        foreign = config.ready_made(arch) or ".py:" in arch
        network = arch if foreign else f"{study.space}#{space.check(Architecture.parse(arch))}"
        card = obtain_teacher(network, False, path.absolute(), {**task, **given}, fleet, show)
    finally:
        fleet.close()
    asked = (network, card["epochs"] and study.teacher_epochs)  # what was not trained by us has 0
    if there and not check and asked != (card["network"], card["epochs"]):
        raise UsageError(
            f"{path} holds {card['network']}, trained for {card['epochs']} epochs; remove it, or choose another --out "
            f"for {network} and {study.teacher_epochs} epochs"
        )
    return card


def task_for(study: Study, resources: Resources, run_dir: Path, fleet: Fleet) -> Json:
    """What every task of a worker holds (engine/training/evaluate.py)."""
    return {
        "study": config.to_dict(study),
        "resources": config.to_dict(resources),
        "run_dir": str(run_dir),
        "device": fleet.device,
    }
