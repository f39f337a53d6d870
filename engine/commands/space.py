"""`space`: lists, shows, samples and checks search spaces."""

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
        "list: the built-in spaces. show: the choices of a space. sample: random architectures. check: test a space of "
        "your own, by building and running some of its members, counting their cost, and pairing their features with a "
        "teacher's."
    )
    parser = command_parser(text, EXAMPLES)
    parser.usage = "%(prog)s {list,show,sample,check} [SPACE] [options]"
    actions = Literal["list", "show", "sample", "check"]
    parser.add_argument("action", type=actions, help="what to do")
    parser.add_argument("space", metavar="SPACE", nargs="?", default="", help="NAME[:option=value,...] or FILE.py:NAME")
    parser.add_argument("--classes", type=int, default=10, help="number of classes")
    parser.add_argument("--resolution", type=int, default=32, help="image size in pixels")
    parser.add_argument("--count", type=int, default=5, help="number of architectures to sample")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws")
    teacher = "check with this teacher: auto (the largest checked member), a weights FILE, or a name such as "
    parser.add_argument("--teacher", type=str, default="auto", help=f"{teacher}torchvision:resnet18")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def run(values: Namespace) -> dict[str, Any] | None:
    for name, least in (("classes", 2), ("resolution", 1), ("count", 1), ("seed", 0)):
        if values[name] < least:
            raise UsageError(f"--{name} is {values[name]}; it must be at least {least}")
    if values.action == "list":
        found = list_spaces()
    elif not values.space:
        raise UsageError(f"space {values.action}: name a space, like nasbench201 or my_space.py:SPACE")
    else:
        found = {"show": show_space, "sample": sample_space, "check": check_space}[values.action](values)
    if values.json:
        return found
    print({"list": list_text, "show": show_text, "sample": sample_text, "check": check_text}[values.action](found))
    return None


def list_spaces() -> dict[str, Any]:
    """The built-in spaces: choices and architectures (None if a network has to be named), options with their defaults,
    and a line about each."""
    import inspect

    from engine.spaces import SPACES

    def facts(make: Any) -> dict[str, Any]:
        parameters = inspect.signature(make).parameters
        options = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        space = make() if len(options) == len(parameters) else None
        size = {"choices": space and len(space.choices), "architectures": space and space.size}
        return {**size, "options": options, "about": (inspect.getmodule(make).__doc__ or "").strip().splitlines()[0]}

    return {name: facts(make) for name, make in SPACES.items()}


def list_text(found: dict[str, Any]) -> str:
    lines = []
    for name, facts in found.items():
        options = ", ".join(f"{key}={value}" for key, value in facts["options"].items())
        size = "by its network" if facts["architectures"] is None else f"{facts['architectures']:>10,} architectures"
        lines += [f"{name:<14}{size}; options {options}", f"    {facts['about']}"]
    return "\n".join([*lines, "A space of your own is FILE.py:NAME (docs/spaces.md)."])


def show_space(values: Namespace) -> dict[str, Any]:
    """The choices of a space, and its range of cost."""
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


def sample_space(values: Namespace) -> dict[str, Any]:
    """Random architectures of a space, with the option of each choice."""
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


def check_space(values: Namespace) -> dict[str, Any]:
    """What `engine.training.spacecheck.run_check` finds, run by a worker."""
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
    few = "," if found["cost_of"] == "space" else f"; the {len(found['checked'])} checked have"
    return "\n".join(
        [
            f"{found['space']}: {found['architectures']:,} architectures, ready to search",
            f"  checked   {', '.join(found['checked'])}",
            f"  features  {', '.join(map(_shape, found['features']))}",
            f"  cost      {found['cost']}{few} {_range(found).strip()}",
            f"  teacher   {found['teacher']}; features paired with the first member: {pairs}",
        ]
    )


def _shape(shape: list[int]) -> str:
    return f"{shape[0]} channels of {shape[1]}x{shape[2]}"


def _range(found: dict[str, Any]) -> str:
    (macs, most_macs), (params, most_params) = found["macs"], found["params"]
    million = f"{macs / 1e6:.2f} to {most_macs / 1e6:.2f} million MACs"
    return f"  {million}, {params:,} to {most_params:,} parameters"
