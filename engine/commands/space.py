"""`space`: the search spaces there are, what is in one, and whether one of your own does what it must."""

from __future__ import annotations

from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from engine.commands.flags import command_parser
from engine.config import Resources
from engine.trial import UsageError

EXAMPLES = """\
list
show mobilenetv2:width=0.5 --resolution 64
sample nasbench201 --count 10
check my_space.py:SPACE --classes 20 --resolution 64"""


def parser() -> ArgumentParser:
    """Flags of the command."""
    text = (
        "list: the built-in spaces. show: the choices of one. sample: random architectures of it. check: builds, runs "
        "and encodes members, counts their cost, and pairs their features with a teacher's; for a space of your own."
    )
    made = command_parser(text, EXAMPLES)
    made.usage = "%(prog)s {list,show,sample,check} [SPACE] [options]"
    actions = Literal["list", "show", "sample", "check"]
    made.add_argument("action", type=actions, help="what to do")
    made.add_argument("space", metavar="SPACE", nargs="?", default="", help="NAME[:option=value,...] or FILE.py:NAME")
    made.add_argument("--classes", type=int, default=10, help="classes of the networks")
    made.add_argument("--resolution", type=int, default=32, help="side of the images in pixels")
    made.add_argument("--count", type=int, default=5, help="architectures to sample")
    made.add_argument("--seed", type=int, default=0, help="seed of what is drawn at random")
    teacher = "check with this teacher: auto (the largest checked member), a weights FILE, or a name such as "
    made.add_argument("--teacher", type=str, default="auto", help=f"{teacher}torchvision:resnet18")
    made.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return made


def run(values: Namespace) -> dict[str, Any] | None:
    if values.action == "list":
        found = listed()
    elif not values.space:
        raise UsageError(f"space {values.action}: say which one, like nasbench201 or my_space.py:SPACE")
    else:
        found = {"show": shown, "sample": sampled, "check": checked}[values.action](values)
    if values.json:
        return found
    print({"list": list_text, "show": show_text, "sample": sample_text, "check": check_text}[values.action](found))
    return None


def listed() -> dict[str, Any]:
    """The built-in spaces: choices, architectures, options with their defaults, a line of text."""
    import inspect

    from engine.spaces import SPACES

    def facts(make: Any) -> dict[str, Any]:
        space, module = make(), inspect.getmodule(make)
        options = {name: p.default for name, p in inspect.signature(make).parameters.items()}
        about = (module.__doc__ or "").strip().splitlines()[0]
        return {"choices": len(space.choices), "architectures": space.size, "options": options, "about": about}

    return {name: facts(make) for name, make in SPACES.items()}


def list_text(found: dict[str, Any]) -> str:
    lines = []
    for name, facts in found.items():
        options = ", ".join(f"{key}={value}" for key, value in facts["options"].items())
        lines += [f"{name:<14}{facts['architectures']:>10,} architectures; options {options}", f"    {facts['about']}"]
    return "\n".join([*lines, "Your own is a file: FILE.py:NAME (docs/spaces.md)."])


def shown(values: Namespace) -> dict[str, Any]:
    """The choices of a space, and the range of its cost."""
    from engine.space import candidates
    from engine.spaces.load import load_space

    space = load_space(values.space)
    all_of = candidates(space, values.classes, 1.0, values.resolution, values.seed)
    return {
        "space": space.name,
        "architectures": space.size,
        "candidates": len(all_of),
        "choices": [{"name": c.name, "options": list(c.options), "ordered": c.ordinal} for c in space.choices],
        "resolution": values.resolution,
        "macs": [int(all_of.macs.min()), int(all_of.macs.max())],
        "params": [int(all_of.params.min()), int(all_of.params.max())],
    }


def show_text(found: dict[str, Any]) -> str:
    counts = f"{found['architectures']:,} architectures, {found['candidates']:,} candidates of a search"
    choices = [
        f"  {choice['name']:<18}{', '.join(map(str, choice['options']))}{'  (ordered)' if choice['ordered'] else ''}"
        for choice in found["choices"]
    ]
    return "\n".join([f"{found['space']}: {counts}", *choices, _range(found)])


def sampled(values: Namespace) -> dict[str, Any]:
    """Random architectures of a space, with the option of each choice by name."""
    from engine.spaces.load import load_space

    space = load_space(values.space)
    drawn = space.sample(values.count, values.seed)

    def options(choices: tuple[int, ...]) -> list[Any]:
        return [choice.options[value] for choice, value in zip(space.choices, choices, strict=True)]

    return {
        "space": space.name,
        "architectures": [{"architecture": str(a), "options": options(a.choices)} for a in drawn],
    }


def sample_text(found: dict[str, Any]) -> str:
    rows = [(entry["architecture"], ", ".join(map(str, entry["options"]))) for entry in found["architectures"]]
    return "\n".join(f"{name}  {options}" for name, options in rows)


def checked(values: Namespace) -> dict[str, Any]:
    """What `engine.training.spacecheck.run_check` found, on one worker."""
    from engine.fleet.drain import answer_of
    from engine.fleet.fleet import submit
    from engine.search.one_architecture import worker
    from engine.tasks import SpaceCheckTask

    task = SpaceCheckTask(values.space, values.classes, values.resolution, values.teacher, values.seed)
    with worker(Resources(device="cpu", workers=1), None, "engine.training.spacecheck") as (fleet, _):
        found: dict[str, Any] = answer_of(submit(fleet, task))
    return found


def check_text(found: dict[str, Any]) -> str:
    pairs = ", ".join(f"{_shape(mine)} with {_shape(theirs)}" for mine, theirs in found["pairs"])
    return "\n".join(
        [
            f"{found['space']}: {found['architectures']:,} architectures, good to search",
            f"  checked   {', '.join(found['checked'])}",
            f"  features  {', '.join(map(_shape, found['features']))}",
            f"  cost      {found['cost']}: {_range(found).strip()}",
            f"  teacher   {found['teacher']}; of the first, it teaches {pairs}",
        ]
    )


def _shape(shape: list[int]) -> str:
    return f"{shape[0]} channels of {shape[1]}x{shape[2]}"


def _range(found: dict[str, Any]) -> str:
    (macs, most_macs), (params, most_params) = found["macs"], found["params"]
    million = f"{macs / 1e6:.2f} to {most_macs / 1e6:.2f} million MACs"
    return f"  {million}, {params:,} to {most_params:,} parameters"
