"""A checkout, and what is installed from a wheel, run from any folder, whatever files that folder holds."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import engine

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("interchange.py", "process_worker_pool.py")  # of Parsl, which starts them by name
# What a wheel is built from.
PACKAGED = (
    *("pyproject.toml", "README.md", "LICENSE", "cli.py", "mfkd.py"),
    *("engine", "kernels", "surrogate", "configs", "examples"),
)
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
    return bare_environment(tmp_path_factory.mktemp("environment"))


def bare_environment(home: Path) -> Path:
    """The interpreter of a new environment in a folder, which has our dependencies but not this package.

    A path that a .pth file adds is not searched for .pth files, so an editable installation in it has no effect.
    """
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


def environment() -> dict[str, str]:
    """The environment, without the settings by which Python may find this checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


def test_a_search_with_several_workers_runs_uninstalled_and_from_elsewhere(
    python: Path, elsewhere: Path, tiny_npz: Path
) -> None:
    assert run([str(python), "-P", "-c", "import parsl, engine"], elsewhere).stderr.endswith("'engine'\n")
    command = [str(python), str(ROOT / "cli.py"), "search", *SMALL, f"--data={tiny_npz}", "--run-dir=run"]
    done = run(command, elsewhere)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["status"], result["evaluations"]["failed"]) == ("finished", 0)


@pytest.fixture(scope="module")
def mfkd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in an environment that has our wheel and nothing else of ours."""
    source, home = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for path in (ROOT / name for name in PACKAGED):
        if path.is_dir():
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(home)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    python = bare_environment(home)
    (wheel,) = home.glob("*.whl")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return home / "bin" / "mfkd"


def test_a_wheel_has_the_configurations_and_examples(mfkd: Path, elsewhere: Path) -> None:
    assert run([str(mfkd), "--version"], elsewhere).stdout == f"mfkd {engine.__version__}\n"
    (package,) = mfkd.parents[1].glob("lib/python*/site-packages/engine")
    for folder in ("configs", "examples"):
        assert {path.name for path in (ROOT / folder).iterdir()} - {"__pycache__"} <= {
            path.name for path in (package / folder).iterdir()
        }
    words = ["-c", "configs/demo.yaml", "--space", "examples/my_space.py:SPACE"]
    done = run([str(mfkd), "config", *words, "--json"], elsewhere)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["data"]["from"] == str(package / "configs" / "demo.yaml")


def test_the_version_is_that_of_the_changelog_and_the_citation() -> None:
    newest = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert newest[1] == cited == engine.__version__


def test_the_demo_starts_from_a_wheel(mfkd: Path, elsewhere: Path) -> None:
    command = [str(mfkd), "search", "--device=cpu", "--workers=1", "--progress=lines"]
    process = subprocess.Popen(command, cwd=elsewhere, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        lines = list(itertools.takewhile(lambda line: "space pretrained" not in line, process.stderr))
    finally:
        process.kill()
        process.wait()
    assert "running the demo (demo.yaml)" in lines[0]
    assert any("data caltech21" in line for line in lines), lines


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
