"""What a search needs before it asks for trials: facts about the data, the candidates, the teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.config import Plan, RunSettings, SearchConfig, check_settings, is_library_model, needs_latency
from engine.fleet.devices import layout
from engine.recipes import fine_tunes_teacher, resolve
from engine.run_folder import RunFolder
from engine.search.baseline_networks import family_members
from engine.search.journal import read_journal
from engine.search.latency.limit import fast_enough, networks_of, new_table, recorded_table
from engine.search.methods.propose import METHODS, find_method
from engine.search.progress import Display
from engine.search.proxies import add_proxies
from engine.search.run_context import RunContext, one_worker, open_context
from engine.space import Candidates, FloatArray, SearchSpace, candidates
from engine.spaces.load import load_space
from engine.tasks import (
    DataFacts,
    ProbeTask,
    Statistic,
    TeacherFacts,
    TeacherOrigin,
    TeacherTask,
    task_from_json,
)
from engine.trial import Architecture, Trial, UsageError

# Even a network without operations takes time per image: loading, normalisation, the classifier.
OVERHEAD_MACS = 1e6
# Photos below which fine-tuning is far ahead of training from scratch: 92 and 37 % on 24 photos each of 30 classes.
FEW_IMAGES = 5_000


@dataclass(frozen=True)
class SearchSetup:
    """A run whose data, candidates and teacher are known, ready to ask for trials.

    `largest` holds only the largest member of the space, which may exceed the limits. `teacher` is None if nothing is
    distilled.
    """

    context: RunContext
    plan: Plan
    candidates: Candidates
    facts: DataFacts
    largest: Candidates
    teacher: TeacherFacts | None = None

    def cost(self, trial: Trial) -> float:
        """Expected cost of a trial, up to a constant factor: passes over the data times MACs.

        It drives the virtual clock, and methods see it as seconds. Measured seconds would be more accurate, but they
        change when a run resumes on another machine, and its decisions must not.
        """
        fidelity, images = trial.fidelity, self.facts.images
        scale = fidelity.width * (fidelity.resolution or self.facts.resolution) / self.facts.resolution
        passes = fidelity.cost() * (1 + images["valid"] / images["train"] if fidelity.with_valid else 1)
        return passes * scale**2 * (self._macs(trial.architecture) + OVERHEAD_MACS)

    def _macs(self, architecture: Architecture) -> float:
        for members in (self.candidates, self.largest):
            row = members.row(architecture)
            if row is not None:
                return float(members.macs[row])
        return float(np.median(self.candidates.macs))


def validated_space(settings: RunSettings) -> SearchSpace:
    """The search space of the settings; UsageError for settings that cannot work, before anything is started."""
    check_settings(settings)
    if settings.config.method not in METHODS:
        raise UsageError(f"no method named '{settings.config.method}'; choose from {', '.join(METHODS)}")
    find_method(settings.config.method)  # it may need a library
    space, config = load_space(settings.config.space), settings.config
    only_of(space, config)
    if space.inherit is not None and not config.low.width == config.high.width == 1:
        raise UsageError(f"networks of {config.space} have no width multiplier; leave out --low.width, --high.width")
    return space


def set_up(context: RunContext, plan: Plan, facts: DataFacts) -> SearchSetup:
    """Finds the candidates and obtains the teacher; `facts` is what `probe` returned."""
    config = context.config
    everything, fit = find_candidates(context.space, config, facts, context.display)
    if needs_latency(config):
        fit = limit_latency(context, fit, facts, context.folder)
    teacher = None
    if needs_teacher(context):
        task = teacher_task(context, everything)
        teacher = obtain_teacher(context, task)
        if context.space.start is not None and teacher.network != task.network:
            raise UsageError(_another_teacher(context, str(task.path), teacher.network))
    largest = everything.where(np.arange(len(everything)) == everything.macs.argmax())
    # What one would have chosen without a search, the best of each family, is among the full trainings.
    first = tuple(fit.architecture(row) for row in family_members(context.space, fit).values())
    plan = replace(plan, valid_images=facts.images["valid"], first=first)
    fit = add_proxies(context, plan, facts.images["train"], fit)
    return SearchSetup(context, plan, fit, facts, largest, teacher)


def probe(context: RunContext) -> DataFacts:
    """Has a worker check data and device; returns its findings."""
    config = context.config
    facts = task_from_json(DataFacts, context.answer(ProbeTask(context.worker)))
    context.display.say(f"data {config.data}: {facts.summary}")
    for warning in facts.warnings:
        context.display.say(f"warning: {warning}")
    if facts.files and facts.images["train"] < FEW_IMAGES and context.space.start is None:
        context.display.say(
            f"warning: {facts.images['train']:,} images are few to train networks of {config.space} from scratch; on "
            "photos, --space pretrained:timm:tf_efficientnet_lite0 reaches far more (docs/pretrained.md)"
        )
    if facts.images["train"] < config.batch_size:
        raise UsageError(
            f"--batch-size {config.batch_size} is more than the {facts.images['train']} training images; lower it, or "
            "leave it out"
        )
    return facts


def only_of(space: SearchSpace, config: SearchConfig) -> list[Architecture]:
    """The architectures of --only; UsageError for one that does not belong to the space."""
    return [space.check(Architecture.parse(word.strip())) for word in config.only.split(",") if word.strip()]


def find_candidates(
    space: SearchSpace, config: SearchConfig, facts: DataFacts, display: Display
) -> tuple[Candidates, Candidates]:
    """All members of the space, and the candidates: those that meet the limits on MACs and parameters."""
    only = only_of(space, config)
    trains_largest = space.start is not None or (config.teacher == "auto" and config.low.kd_loss != "none")
    everything = space_members(space, config, facts, () if trains_largest else only)
    allowed = space_members(space, config, facts, only) if only else everything
    inside = (allowed.macs >= config.min_macs) & (allowed.macs <= config.max_macs)
    fit = allowed.where(inside & (allowed.params <= config.max_params))
    if not len(fit):
        limits = {"max_macs": config.max_macs, "max_params": config.max_params, "min_macs": config.min_macs}
        given = [f"--{name.replace('_', '-')} {value:g}" for name, value in limits.items() if 0 < value < math.inf]
        raise UsageError(
            f"no architecture of {space.name} meets {' and '.join(given)} at {facts.resolution} pixels; its "
            f"architectures have {_range(allowed.macs)} MACs and {_range(allowed.params)} parameters; "
            "change the limits, the space or the resolution"
        )
    display.say(
        f"space {space.name}: {space.size:,} architectures, {len(fit):,} candidates, "
        f"{fit.macs.min() / 1e6:.1f} to {fit.macs.max() / 1e6:.1f} million MACs"
    )
    return everything, fit


def _range(values: FloatArray) -> str:
    return f"{values.min():,.0f} to {values.max():,.0f}"


def space_members(
    space: SearchSpace, config: SearchConfig, facts: DataFacts, only: Sequence[Architecture] = ()
) -> Candidates:
    """All members of the space, or those in `only`, with their cost at full fidelity."""
    resolution = config.high.resolution or facts.resolution
    return candidates(space, len(facts.classes), config.high.width, resolution, config.seed, only)


def largest_member(everything: Candidates) -> Architecture:
    """The member with the most multiply-accumulates: the default teacher."""
    return everything.architecture(int(everything.macs.argmax()))


def needs_teacher(context: RunContext) -> bool:
    """Whether the run needs a teacher: to distil from, or for the weights that the members of its space inherit."""
    return context.config.low.kd_loss != "none" or context.space.start is not None


def teacher_task(context: RunContext, everything: Candidates, untrained: bool = False) -> TeacherTask:
    """The task that makes the teacher of a run, or checks its file; `untrained` leaves it as built, to be timed.

    Raises UsageError if the members of the space inherit from their largest one, and another teacher is named.
    """
    config, library = context.config, is_library_model(context.config.teacher)
    if library and context.space.start is not None:
        raise UsageError(_another_teacher(context, config.teacher, config.teacher))
    network = config.teacher if library else f"{config.space}#{largest_member(everything)}"
    path = context.folder.teacher_weights(config)
    if untrained:
        return TeacherTask(context.worker, network, path, "untrained")
    if not fine_tunes_teacher(config):
        return TeacherTask(context.worker, network, path)
    weights = Path(config.teacher_weights).absolute() if config.teacher_weights else None
    return TeacherTask(context.worker, network, path, "finetune", weights)


def _another_teacher(context: RunContext, teacher: str, network: str) -> str:
    space = context.config.space
    return (
        f"--teacher {teacher}: the networks of {space} inherit the weights of its largest member, so their teacher "
        f"must be that, not {network}; leave --teacher out, or give a FILE made by: "
        f"cli.py teacher --space {space} --data ..."
    )


def limit_latency(context: RunContext, fit: Candidates, facts: DataFacts, folder: RunFolder) -> Candidates:
    """The candidates within --max-latency-ms, with their latencies, by the measurements stored in the run folder."""
    networks, begun = networks_of(context.config, facts), bool(read_journal(folder.journal).asked)
    table = recorded_table(folder.latencies, begun, lambda: new_table(context, networks, fit))
    left, how = fast_enough(fit, networks, table, context.config.max_latency_ms)
    context.display.say(how)
    return left


def obtain_teacher(context: RunContext, task: TeacherTask) -> TeacherFacts:
    """Checks the teacher's weights file against the data, or makes it if there is none."""
    display = context.display
    display.say(f"teacher: {task.path if task.path.exists() else task.network}")
    facts = task_from_json(TeacherFacts, context.answer(task))
    display.say(
        f"teacher: {facts.network}, validation accuracy {facts.accuracy:.4f}, trained for {facts.seconds:.0f} s"
    )
    display.log.teacher(facts)
    if facts.elsewhere:
        display.say(
            "teacher: trained on other images or with another --seed, so it may have seen some of these validation "
            "images"
        )
    return facts


@dataclass(frozen=True)
class TeacherRequest:
    """What the `teacher` command asks for: a network and the file to write.

    The network is auto, an architecture of the space, torchvision:NAME, timm:NAME or FILE.py:NAME. `weights` are
    ready-made, with the `mean` and `std` of the images they were trained on. `check_only` accepts any network in the
    file.
    """

    network: str
    path: Path
    check_only: bool = False
    weights: Path | None = None
    mean: Statistic | None = None
    std: Statistic | None = None


def make_teacher(settings: RunSettings, request: TeacherRequest, display: Display) -> TeacherFacts:
    """Trains or imports a teacher if its file does not exist, and checks the file against the data.

    Raises UsageError if the file exists and holds another network, or one trained for another number of epochs, or if
    --teacher-weights are given for a teacher that is not fine-tuned.
    """
    config, path = settings.config, request.path.absolute()
    _check_network(config, request.network)
    folder = RunFolder(path.parent)
    with open_context(settings, folder, one_worker(layout(settings.resources)), display) as context:
        existed = path.exists()
        facts = probe(context)
        config = resolve(config, facts.images["train"])
        context = replace(context, config=config)
        network, origin = _network_name(context, facts, request.network), _origin(context, request)
        weights = request.weights or (Path(config.teacher_weights).absolute() if config.teacher_weights else None)
        task = TeacherTask(context.worker, network, path, origin, weights, request.mean, request.std)
        made = obtain_teacher(context, task)
    same = network == made.network and made.epochs in (0, config.teacher_epochs)  # 0: we did not train it
    if existed and not request.check_only and not same:
        raise UsageError(
            f"{path} holds {made.network}, trained for {made.epochs} epochs; remove it, or choose another --out for "
            f"{network} and {config.teacher_epochs} epochs"
        )
    return made


def _check_network(config: SearchConfig, network: str) -> None:
    """Raises UsageError, before workers start and data are read, for a name that is not one of a network."""
    if network == "auto" or _is_outside_space(network):
        return
    try:
        load_space(config.space).check(Architecture.parse(network))
    except UsageError as error:
        raise UsageError(f"--arch: {error}; or give torchvision:NAME, timm:NAME or FILE.py:NAME") from None


def _origin(context: RunContext, request: TeacherRequest) -> TeacherOrigin:
    """Whether the teacher that is asked for is imported, fine-tuned, or trained from scratch."""
    if request.weights is not None:
        return "import"
    teacher = request.network if request.network == "auto" or is_library_model(request.network) else "another"
    return "finetune" if fine_tunes_teacher(replace(context.config, teacher=teacher)) else "scratch"


def _is_outside_space(network: str) -> bool:
    return is_library_model(network) or ".py:" in network


def _network_name(context: RunContext, facts: DataFacts, network: str) -> str:
    """The network that the `teacher` command's --arch means, as recorded in a weights file."""
    if _is_outside_space(network):
        return network
    if network == "auto":
        architecture = largest_member(space_members(context.space, context.config, facts))
    else:
        architecture = context.space.check(Architecture.parse(network))
    return f"{context.config.space}#{architecture}"
