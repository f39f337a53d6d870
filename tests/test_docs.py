"""The files that the pages name exist, and the commands in the pages work."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import cli
import mfkd
from engine.commands.space import show_space

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Commands that only read, or write a text: they run here as they stand, in a folder that has what they name. For a
# search only the configuration is resolved and checked. The other commands are run by the tests named after them.
LOOKS = {"config", "status", "trials", "explain", "report", "space", "submit"}


def listed(page: Path) -> set[str]:
    return set(re.findall(r"^\| `([^`]+)` \|", page.read_text(), re.MULTILINE))


def test_the_readme_lists_every_room() -> None:
    rooms = listed(ROOT / "README.md")
    for name in rooms:
        assert (ROOT / name).exists(), name
    parts = [part for part in (ROOT / "engine").iterdir() if not part.name.startswith("__")]
    tops = [ROOT / "cli.py", ROOT / "mfkd.py", ROOT / "kernels", ROOT / "surrogate", *parts]
    assert {f"{part.relative_to(ROOT)}{'/' if part.is_dir() else ''}" for part in tops} <= rooms


def test_every_module_begins_with_a_line_that_says_what_it_is_for() -> None:
    for room in ("engine", "kernels", "surrogate", "bench"):
        for path in (ROOT / room).rglob("*.py"):
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert re.match(r"\S.{10,}?[.:](\n|$)", text.replace("\n", " ") + "\n"), path


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/\w[\w-]*\.md)", (ROOT / "README.md").read_text()))
    assert {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_files_that_a_page_names_exist() -> None:
    """Paths of this repository in `code`, in the pages that explain it."""
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "design.md"):
        for path in re.findall(r"`((?:engine|kernels|surrogate|bench|tests|docs|configs)/[\w./-]+)`", page.read_text()):
            assert (ROOT / path).exists() or "NAME" in path, f"{page.name}: {path}"


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every `python cli.py ...` line in the fenced blocks of a page."""
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.startswith(("python cli.py ", "mfkd ")) else []
            if words:
                yield words[2:] if words[0] == "python" else words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_in_the_pages_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        assert set(re.findall(r"^(?:\w+=\S+ )*make ([\w-]+)", block, re.MULTILINE)) <= targets


@pytest.fixture
def home(tmp_path: Path, finished_run: Path, tiny_npz: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the pages assume it: data, a run, configurations and examples. Devices as on eight GPUs."""
    shutil.copytree(finished_run, tmp_path / "runs" / "photos")
    (tmp_path / "runs" / "small").symlink_to("photos")
    shutil.copy(tiny_npz, tmp_path / "cifar100.npz")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos.yaml").write_text("data: photos\nmax_high: 5\n")
    (tmp_path / "runs" / "which").mkdir()
    (tmp_path / "runs" / "which" / "recommended.yaml").write_text("low:\n  epochs: 3\n")
    for name in ("configs", "examples", "bench"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(8))))
    return tmp_path


def limited_searches() -> Iterator[tuple[str, int, float]]:
    """Space, resolution and --max-macs of each search that the pages and `mfkd` show with a limit on MACs."""
    python = (ROOT / "README.md").read_text() + (mfkd.__doc__ or "")
    for space, limit in re.findall(r'data="photos/", space="(.+?)".*max_macs=([\d.e]+)\)', python):
        yield space, 224, float(limit)
    for words in (words for page in PAGES for words in commands(page)):
        if words[0] in ("search", "fidelity-study") and "--max-macs" in words:
            _, values = cli.parse(words)
            yield values.space, values.resolution or 224, values.max_macs


def test_limits_on_macs_in_the_pages_leave_candidates() -> None:
    searches = list(limited_searches())
    assert len(searches) >= 3
    for space, resolution, limit in searches:
        _, values = cli.parse(["space", "show", space, f"--resolution={resolution}"])
        assert show_space(values)["macs"][0] <= limit, f"{space} at {resolution} pixels"


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=lambda page: page.name)
def test_commands_in_the_pages_work(page: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(page):
        name, *flags = words
        if name in LOOKS and "--go" not in flags:
            assert cli.main(words) == 0, f"{words}: {capsys.readouterr().err}"
        elif name == "search":
            flags = [flag for flag in flags if flag != "--dry-run"]
            assert cli.main(["config", *flags]) == 0, f"{words}: {capsys.readouterr().err}"
        else:
            cli.parse(words)
