"""The rooms of the repository and the arrows between them, as docs/design.md draws them."""

from __future__ import annotations

import ast
import graphlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.run_folder import RunFolder
from engine.trial import Architecture, Fidelity, Trial

ROOT = Path(__file__).resolve().parent.parent
OURS = {"engine", "kernels", "surrogate", "cli", "mfkd", "bench", "tests"}
# The rooms of engine, and what each may import beside itself and the core.
CORE = {"config", "recipes", "run_folder", "shipped", "space", "spaces", "stop_files", "tasks", "trial"}
DRIVER = {"commands", "doctor", "fleet", "report", "search"}  # never imports torch
WORKER = {"data", "export", "latency", "selftest", "training"}
NETWORKS = {"networks"}  # imports torch, and of ours only the errors; spaces import it when they build a network
MAX_PARAMETERS = 6

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


ENTRY_POINTS = [ROOT / "cli.py", ROOT / "mfkd.py"]
MODULES = {module_of(path): path for path in [*ENTRY_POINTS, *sources("engine", "kernels", "surrogate")]}


def imports(path: Path, only_at_the_top: bool = False) -> set[str]:
    """Dotted names of the modules that a file imports: inside functions too, and for type checking."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if only_at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in whole}
    return names


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def engine_rooms(path: Path, only_at_the_top: bool = False) -> set[str]:
    """The rooms of engine that a file imports: engine.data.dataset -> data."""
    return {name.split(".")[1] for name in imports(path, only_at_the_top) if name.startswith("engine.")}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "engine").parts[0].removesuffix(".py")


def engine_files(rooms: set[str]) -> list[Path]:
    return [path for path in sources("engine") if room_of(path) in rooms]


def test_no_imports_form_a_circle() -> None:
    """Neither at the top of modules nor inside functions, where a circle would only be hidden."""
    graph = {name: (imports(path) & set(MODULES)) - {name} for name, path in MODULES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("imports form a circle: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("room", ["kernels", "surrogate"])
def test_leaf_rooms_import_nothing_of_ours(room: str) -> None:
    for path in sources(room):
        assert tops(path) & (OURS - {room}) == set(), path


def test_the_entry_points_import_only_engine() -> None:
    for path in ENTRY_POINTS:
        assert tops(path) & OURS == {"engine"}, path


def test_nothing_imports_the_entry_points_the_benches_or_the_tests() -> None:
    for path in sources("engine", "kernels", "surrogate"):
        assert tops(path) & {"cli", "mfkd", "bench", "tests"} == set(), path


def test_every_part_of_engine_belongs_to_a_room() -> None:
    assert {room_of(path) for path in sources("engine")} - {"__init__"} == CORE | DRIVER | WORKER | NETWORKS


@pytest.mark.parametrize(
    ("rooms", "allowed", "libraries"),
    [
        (CORE, CORE | NETWORKS, set()),
        (NETWORKS, NETWORKS | {"trial"}, set()),
        (DRIVER, DRIVER | CORE, {"surrogate"}),
        (WORKER, WORKER | CORE | NETWORKS, {"kernels"}),
    ],
    ids=["core", "networks", "driver", "worker"],
)
def test_rooms_import_only_what_the_arrows_allow(rooms: set[str], allowed: set[str], libraries: set[str]) -> None:
    for path in engine_files(rooms):
        assert engine_rooms(path) <= allowed, path
        assert tops(path) & OURS <= {"engine"} | libraries, path


def test_the_core_imports_networks_only_to_build_one() -> None:
    for path in engine_files(CORE):
        assert engine_rooms(path, only_at_the_top=True) & NETWORKS == set(), path


@pytest.mark.parametrize(
    ("package", "homes"),
    [("nvidia", {"engine/data/loader.py"}), ("parsl", {"engine/fleet/fleet.py", "engine/fleet/providers.py"})],
)
def test_dali_and_parsl_have_one_place_each(package: str, homes: set[str]) -> None:
    users = {str(path.relative_to(ROOT)) for path in MODULES.values() if package in tops(path)}
    assert users == homes


def test_the_driver_starts_without_torch() -> None:
    modules = [module_of(path) for path in engine_files(DRIVER | CORE)]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "import cli, mfkd\n"
        "assert 'torch' not in sys.modules and 'nvidia.dali' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def run_files() -> set[str]:
    """Names of the files in a run folder."""
    folder, trial = RunFolder(Path("/run")), Trial(0, Architecture((0,)), Fidelity("high"))
    values = [getattr(folder, name) for name, kind in inspect.getmembers(RunFolder) if isinstance(kind, property)]
    paths = [value.path if isinstance(value, RunFolder) else value for value in values]
    names = {path.name for path in [*paths, folder.training_state(trial)] if path.suffix}
    return {name.removeprefix(trial.key) for name in names}


def text_in(path: Path) -> Iterator[tuple[int, str]]:
    """String literals of a file, with their lines, without docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


# The default of `teacher --out`, a file of the user's own.
OTHER_FILES = {("engine/commands/teacher.py", "teacher.safetensors")}


def test_only_the_run_folder_names_its_files() -> None:
    names = run_files()
    assert {"config.yaml", "journal.jsonl", "run.json", "result.json", "latency.json", ".state.pt"} <= names
    found = [
        f"{path.relative_to(ROOT)}, line {line}: {name}"
        for path in MODULES.values()
        if path != ROOT / "engine" / "run_folder.py"
        for line, text in text_in(path)
        for name in names
        if text.endswith(name) and (str(path.relative_to(ROOT)), name) not in OTHER_FILES
    ]
    assert found == [], "use RunFolder instead"


def parameters(function: Function) -> list[str]:
    """Names of a function's parameters, without self or cls."""
    names = [one.arg for one in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]]
    return [name for name in names if name not in ("self", "cls")]


def test_functions_of_the_search_have_few_parameters() -> None:
    """More than six call for a dataclass like RunContext, or for a reason in the docstring."""
    many = [
        f"{path.relative_to(ROOT)}, {node.name}: {len(parameters(node))}"
        for path in sources("engine/search")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, Function) and len(parameters(node)) > MAX_PARAMETERS
        if "parameters" not in (ast.get_docstring(node) or "")
    ]
    assert many == []
