"""Checks that a search space has what a search needs; errors say what is wrong and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.config import SearchConfig
from engine.networks import count_cost
from engine.space import IntMatrix, SearchSpace, candidates
from engine.spaces.load import load_space
from engine.tasks import SpaceCheckTask, task_from_json
from engine.training import teacher as teachers
from engine.training.distill import Objective, pair, teacher_output
from engine.trial import Architecture, UsageError

Json = dict[str, Any]
RANDOM_MEMBERS = 4
MAX_OPTIONS = 127  # option indices are stored as int8
WIDTHS = (1.0, 0.5)
IMAGES = 4


def run_check(payload: Json) -> Json:
    """SpaceCheckTask -> what the command prints: checks a space by building some of its members.

    Raises UsageError for the first thing that would go wrong in a search.
    """
    task = task_from_json(SpaceCheckTask, payload)
    torch.set_num_threads(1)
    space, classes, resolution = load_space(task.space), task.classes, task.resolution
    check_choices(space)
    members = some_members(space, task.seed)
    check_canonical(space, members)
    shapes = [check_network(space, member, classes, width, resolution) for width in WIDTHS for member in members]
    costs = check_cost(space, members, classes, resolution)
    name, teacher = teacher_of(task, space, members)
    if space.cost is not None:
        everything = candidates(space, classes, WIDTHS[0], resolution, task.seed)
        costs = np.stack([everything.macs, everything.params], axis=1)
    pairs = [check_losses(space, member, teacher, name, classes, resolution) for member in members]
    return {
        "space": task.space,
        "architectures": space.size,
        "checked": [str(member) for member in members],
        "features": [list(shape[1:]) for shape in shapes[0]],
        "cost": "closed form" if space.cost is not None else "counted on built networks",
        "cost_of": "space" if space.cost is not None else "checked",
        "macs": [int(costs[:, 0].min()), int(costs[:, 0].max())],
        "params": [int(costs[:, 1].min()), int(costs[:, 1].max())],
        "teacher": name,
        "pairs": pairs[0],
    }


def glance(spec: str, classes: int, width: float, resolution: int) -> None:
    """Builds and runs the first and the last member: the quick check before a search."""
    space = load_space(spec)
    check_choices(space)
    for member in some_members(space, 0)[:2]:
        network = built(space, member, classes, width).eval()
        with torch.no_grad():
            outputs(network, torch.zeros(2, 3, resolution, resolution), classes, f"{spec}, architecture {member}")


def some_members(space: SearchSpace, seed: int) -> list[Architecture]:
    """The member of all first options, that of all last options, and some random ones."""
    ends = [Architecture((0,) * len(space.choices)), Architecture(tuple(r - 1 for r in space.radices))]
    return list(dict.fromkeys([*ends, *space.sample(RANDOM_MEMBERS, seed)]))


def check_choices(space: SearchSpace) -> None:
    for choice in space.choices:
        if not 1 <= len(choice.options) <= MAX_OPTIONS:
            raise UsageError(f"choice '{choice.name}' has {len(choice.options)} options; it takes 1 to {MAX_OPTIONS}")
        repeated = next((option for option in choice.options if choice.options.count(option) > 1), None)
        if repeated is not None:
            raise UsageError(f"choice '{choice.name}' has the option {repeated!r} twice; remove one")
    if space.size < 2:
        raise UsageError(f"{space.name} has {space.size} architecture; give a choice more than one option")


def check_canonical(space: SearchSpace, members: list[Architecture]) -> None:
    """`canonical` must return a member that is its own canonical form."""
    for member in members if space.canonical else []:
        assert space.canonical is not None
        canonical = tuple(space.canonical(member.choices))
        space.check(Architecture(canonical))
        if tuple(space.canonical(canonical)) != canonical:
            raise UsageError(
                f"canonical({member}) is {Architecture(canonical)}, whose canonical form is another one; canonical "
                "must return a canonical argument unchanged"
            )


def check_network(
    space: SearchSpace, member: Architecture, classes: int, width: float, resolution: int
) -> list[torch.Size]:
    """Builds, runs and backpropagates a member once; returns the shapes of its features."""
    label = f"architecture {member} at width {width:g}"
    network = built(space, member, classes, width)
    again = built(space, member, classes, width).state_dict()
    if any(not torch.equal(value, again[name]) for name, value in network.state_dict().items()):
        raise UsageError(
            f"{label}: two builds from one seed have different weights; draw random numbers with torch only"
        )
    images = torch.randn(IMAGES, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    logits, features = outputs(network.train(), images, classes, label)
    (logits.square().sum() + sum(f.float().mean() for f in features)).backward()
    if any(p.grad is not None and not torch.isfinite(p.grad).all() for p in network.parameters()):
        raise UsageError(f"{label}: gradients are not finite on the first batch; check its initialisation")
    network.eval()
    with torch.no_grad():
        batch, _ = outputs(network, images, classes, label)
        single, _ = outputs(network, images[:1], classes, label)
    if not torch.allclose(batch[:1], single, rtol=1e-3, atol=1e-4):
        raise UsageError(
            f"{label}: in evaluation mode the logits of an image depend on the other images of its batch; remove the "
            "layer that mixes images"
        )
    return [feature.shape for feature in features]


def built(space: SearchSpace, member: Architecture, classes: int, width: float) -> nn.Module:
    torch.manual_seed(0)
    try:
        network = space.build(member.choices, classes, width)
    except Exception as error:
        raise UsageError(f"build({member.choices}, {classes}, {width:g}) raises {_message(error)}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"build returns a {type(network).__name__}; it must be a torch.nn.Module")
    return network


def outputs(network: nn.Module, images: Tensor, classes: int, label: str) -> tuple[Tensor, list[Tensor]]:
    """The checked output (logits, features) of a network."""
    try:
        output = network(images)
    except Exception as error:
        raise UsageError(f"{label}: its forward on images {tuple(images.shape)} raises {_message(error)}") from error
    if not (isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], list | tuple)):
        raise UsageError(f"{label}: its forward must return (logits, [features]), as engine.networks.Staged does")
    logits, features = output[0], list(output[1])
    if not isinstance(logits, Tensor) or logits.shape != (len(images), classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"{label}: logits are {found}; they must be {(len(images), classes)}")
    if not features or any(not isinstance(f, Tensor) or f.ndim != 4 or len(f) != len(images) for f in features):
        raise UsageError(f"{label}: features must be one or more tensors (N, C, H, W), to be paired with a teacher's")
    sizes = [feature.shape[2] * feature.shape[3] for feature in features]
    if sizes != sorted(sizes, reverse=True):
        raise UsageError(f"{label}: features must come finest first; their sizes are {_sizes(features)}")
    return logits, features


def check_cost(space: SearchSpace, members: list[Architecture], classes: int, resolution: int) -> Any:
    """MACs and parameters (n, 2) as torch counts them; a closed form must agree."""
    counted = np.zeros((len(members), 2))
    rows: IntMatrix = np.array([member.choices for member in members], dtype=np.int8)
    for width, pixels in ((1.0, resolution), (WIDTHS[-1], resolution), (1.0, 2 * resolution)):
        with torch.device("meta"):
            now = np.array([count_cost(built(space, member, classes, width), pixels) for member in members])
        if space.cost is not None:
            claimed = np.stack(space.cost(rows, classes, width, pixels), axis=1)
            wrong = np.flatnonzero((claimed != now).any(axis=1))
            if len(wrong):
                (macs, params), (true_macs, true_params) = claimed[wrong[0]], now[wrong[0]]
                raise UsageError(
                    f"cost of {members[wrong[0]]} at width {width:g}, {pixels} pixels: it gives {macs:,.0f} MACs and "
                    f"{params:,.0f} parameters, torch counts {true_macs:,} and {true_params:,}; correct it, or omit "
                    "`cost`"
                )
        if (width, pixels) == (1.0, resolution):
            counted = now
    return counted


def teacher_of(task: SpaceCheckTask, space: SearchSpace, members: list[Architecture]) -> tuple[str, nn.Module]:
    """Name and network of the teacher that features are paired with: from a file, or untrained with the same shapes."""
    given, classes, resolution = task.teacher, task.classes, task.resolution
    if given.endswith(".safetensors"):
        return given, teachers.freeze(teachers.load(Path(given)), torch.device("cpu"))
    if given != "auto":
        return given, teachers.freeze(teachers.build(given, classes, resolution), torch.device("cpu"))
    # Only its shapes matter. In most spaces the largest member has the last option of each choice.
    with torch.device("meta"):
        costs = [count_cost(space.build(member.choices, classes, 1.0), resolution)[0] for member in members]
    largest = members[int(np.argmax(costs))]
    return f"{space.name} {largest}", teachers.freeze(built(space, largest, classes, 1.0), torch.device("cpu"))


def check_losses(
    space: SearchSpace, member: Architecture, teacher: nn.Module, name: str, classes: int, resolution: int
) -> list[list[list[int]]]:
    """Computes the losses of one step; returns the pairs of features, each as two shapes (C, H, W)."""
    label = f"architecture {member}"
    images = torch.randn(IMAGES, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    student = outputs(built(space, member, classes, 1.0).train(), images, classes, label)
    with torch.no_grad():
        target = teacher(images)
    shapes = [f.shape for f in student[1]], [f.shape for f in target[1]]
    pairs = [(shapes[0][mine], shapes[1][theirs]) for mine, theirs in pair(*shapes)]
    if any(mine[2:] != theirs[2:] for mine, theirs in pairs):
        raise UsageError(
            f"{label}: no feature has the size of one of the teacher {name}'s: {_sizes(student[1])} here, "
            f"{_sizes(target[1])} there; change the strides, or choose another teacher"
        )
    labels = torch.arange(IMAGES) % classes
    for terms in ("kd+at", "kd+nst"):
        objective = Objective(SearchConfig(), terms, student, target)
        loss = objective(student, teacher_output(target, objective.feature_keys), labels)
        if not torch.isfinite(loss):
            raise UsageError(
                f"{label}: the loss {terms} is not finite on the first batch; check the scale of its features"
            )
        loss.backward(retain_graph=True)
    return [[list(mine[1:]), list(theirs[1:])] for mine, theirs in pairs]


def _sizes(features: list[Tensor]) -> str:
    return ", ".join(f"{feature.shape[2]}x{feature.shape[3]}" for feature in features)


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]
