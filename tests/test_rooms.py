"""The arrows between rooms, as docs/design.md draws them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"engine", "kernels", "surrogate", "cli", "bench", "tests"}
WORDS = {"config", "orders", "space", "trial"}
BRAIN = {"commands", "doctor", "fleet", "report", "search"}
MUSCLE = {"data", "export", "networks", "selftest", "training"}


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def engine_parts(path: Path) -> set[str]:
    """Which parts of engine a file imports: engine.data.dataset -> data."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("engine.")}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "engine").parts[0].removesuffix(".py")


@pytest.mark.parametrize("room", ["kernels", "surrogate"])
def test_leaf_rooms_import_nothing_of_ours(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        assert tops(path) & (OURS - {room}) == set(), path


def test_cli_knows_only_engine() -> None:
    assert tops(ROOT / "cli.py") & OURS == {"engine"}


def test_nobody_imports_the_command_line_the_benches_or_the_tests() -> None:
    for room in ("engine", "kernels", "surrogate"):
        for path in (ROOT / room).rglob("*.py"):
            assert tops(path) & {"cli", "bench", "tests"} == set(), path


def test_brain_and_muscle_meet_in_the_words_only() -> None:
    parts = {part_of(path) for path in (ROOT / "engine").rglob("*.py")} - {"__init__", "spaces"}
    assert parts == BRAIN | MUSCLE | WORDS
    for path in (ROOT / "engine").rglob("*.py"):
        part, used = part_of(path), engine_parts(path)
        if part in MUSCLE:
            assert used & BRAIN == set(), path
        if part in BRAIN:
            assert used & MUSCLE == set(), path


@pytest.mark.parametrize(
    ("package", "homes"),
    [("nvidia", {"engine/data/loader.py"}), ("parsl", {"engine/fleet/fleet.py", "engine/fleet/providers.py"})],
)
def test_an_engine_of_others_has_its_doors(package: str, homes: set[str]) -> None:
    users = {
        str(path.relative_to(ROOT))
        for room in ("engine", "kernels", "surrogate")
        for path in (ROOT / room).rglob("*.py")
        if package in tops(path)
    }
    assert users == homes


def test_the_brain_starts_without_torch() -> None:
    engine = ROOT / "engine"
    files = [path for path in engine.rglob("*.py") if part_of(path) in BRAIN | WORDS | {"spaces"}]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if path.stem != "__init__"]
    code = (
        "import importlib, sys\n"
        f"for name in {sorted(modules)}: importlib.import_module(name)\n"
        "import cli\n"
        "assert 'torch' not in sys.modules and 'nvidia.dali' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
