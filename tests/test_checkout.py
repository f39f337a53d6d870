"""A checkout runs from any folder without being installed, whatever files that folder holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("interchange.py", "process_worker_pool.py")  # of Parsl, which starts them by name
SHADOWS = ("cli", "engine", "kernels", "surrogate", "search", "data", "report", "random", "tempfile")
SMALL = [
    "--space=nasbench201:channels=4,cells=1",
    "--low.kd-loss=none",
    "--low.epochs=1",
    "--high.epochs=1",
    "--max-low=4",
    "--max-high=1",
    "--batch-size=16",
    "--data-backend=resident",
    "--device=cpu",
    "--workers=2",
    "--students-per-gpu=1",
    "--progress=none",
]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has our dependencies but not this package.

    A path that a .pth file adds is not searched for .pth files, so an editable installation in it has no effect.
    """
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    places = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "dependencies.pth").write_text("\n".join(places))
    for name in SCRIPTS:
        _, _, body = (Path(sys.executable).parent / name).read_text().partition("\n")
        script = home / "bin" / name
        script.write_text(f"#!{home}/bin/python\n{body}")
        script.chmod(0o755)
    return home / "bin" / "python"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with files that have the names of our modules, and of the standard library's."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name}.py of the current folder was imported')\n")
    return folder


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder, with none of the settings by which Python may find this checkout."""
    told = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(command, cwd=folder, env=told, capture_output=True, text=True, timeout=300, check=False)


def test_a_search_with_several_workers_runs_uninstalled_and_from_elsewhere(
    python: Path, elsewhere: Path, tiny_npz: Path
) -> None:
    assert run([str(python), "-P", "-c", "import parsl, engine"], elsewhere).stderr.endswith("'engine'\n")
    command = [str(python), str(ROOT / "cli.py"), "search", *SMALL, f"--data={tiny_npz}", "--run-dir=run"]
    done = run(command, elsewhere)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["status"], result["evaluations"]["failed"]) == ("finished", 0)


ASK = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from engine.config import Resources
from engine.fleet.devices import Layout
from engine.fleet.fleet import open_fleet

fleet = open_fleet(Resources(device="cpu"), Layout(2), Path("logs"), module="tests.light")
try:
    print(json.dumps(fleet.submit("importable", {{"names": {list(SHADOWS)!r}}}).result(120)))
finally:
    fleet.close()
"""


def test_a_worker_imports_our_packages_and_nothing_of_the_current_folder(python: Path, elsewhere: Path) -> None:
    """Nor do packages of `engine`, such as engine/search, become modules of their own."""
    done = run([str(python), "-P", "-c", ASK], elsewhere)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name for name in SHADOWS if found[name] and Path(found[name]).is_relative_to(ROOT)} == {
        "cli",
        "engine",
        "kernels",
        "surrogate",
    }
    assert [found[name] for name in ("search", "data", "report")] == [None] * 3
    assert not any(place and Path(place).is_relative_to(elsewhere) for place in found.values())
