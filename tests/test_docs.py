"""The files that the pages name exist, and the commands in the pages work."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import cli
import mfkd
from engine.commands.space import show_space
from engine.data import caltech21

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Commands that only read, or write a text: they run here as they stand, in a folder that has what they name. For a
# search only the configuration is resolved and checked. The other commands are run by the tests named after them.
LOOKS = {"config", "status", "trials", "explain", "report", "space", "submit"}
ROOMS = ("engine", "kernels", "surrogate", "bench", "tests", "docs", "configs", "examples")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Flags of other programs, and one that does not exist, that the pages name.
OTHERS = {"--no-kill", "--gpus-per-node", "--gpus-per-task", "--requeue", "--exclusive", "--mem", "--max-hi"}


def test_the_page_on_design_lists_every_room() -> None:
    _, _, section = (ROOT / "docs" / "design.md").read_text().partition("\n## What is where\n")
    rooms = set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))
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


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(FENCED, "", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_pages_are_few() -> None:
    """Twelve, beside what was found (evidence.md) and the results, which commands write."""
    assert len([page for page in (ROOT / "docs").glob("*.md") if page.name != "evidence.md"]) <= 12


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_to_a_page_and_to_a_heading_of_it(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([\w-]+))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Paths of this repository in `code`."""
    for path in re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w./-]+)`", page.read_text()):
        assert (ROOT / path).exists() or "NAME" in path, path


def test_pages_that_the_code_names_exist() -> None:
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.*") if path.suffix in (".py", ".yaml", ".ipynb")]
    for file in (*files, ROOT / "cli.py", ROOT / "mfkd.py", ROOT / "Makefile"):
        for page in re.findall(r"docs/[\w/-]+\.md", file.read_text()):
            assert (ROOT / page).exists(), f"{file.relative_to(ROOT)}: {page}"


def lines(page: Path) -> Iterator[list[str]]:
    """The words of every line in the fenced blocks of a page that are not Python, without a prompt."""
    for language, block in re.findall(FENCED, page.read_text()):
        if language != "python":
            for line in block.replace("\\\n", " ").splitlines():
                yield shlex.split(line.removeprefix("$ "), comments=True) if is_command(line) else []


def is_command(line: str) -> bool:
    return bool(re.match(r"(\$ )?(\w+=\S+ )*(python|mfkd|pip|make) ", line))


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every `python cli.py ...` or `mfkd ...` in the fenced blocks of a page."""
    for words in lines(page):
        if words[:2] == ["python", "cli.py"]:
            yield words[2:]
        elif words[:1] == ["mfkd"]:
            yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_runs_or_installs_exists(page: Path) -> None:
    """Targets of make, modules and tests that `python -m` runs, extras that pip installs."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for words in lines(page):
        while words and "=" in words[0]:
            del words[0]
        if words[:1] == ["make"]:
            assert words[1] in targets, words
        elif words[:2] == ["python", "-m"]:
            assert find_spec(words[2]), words
            assert all((ROOT / word).exists() for word in words[3:] if word.startswith(("tests/", "bench/"))), words
        elif words[:1] == ["pip"]:
            named = re.findall(r"^\.\[([\w,]+)\]$", "\n".join(words), re.MULTILINE)
            assert {extra for group in named for extra in group.split(",")} <= extras, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_pages_parses(page: Path) -> None:
    for language, block in re.findall(FENCED, page.read_text()):
        if language == "python":
            ast.parse(block)


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """The flags of all commands; of a group such as --low.epochs also the group's name."""
    parsers = [importlib.import_module(f"engine.commands.{name.replace('-', '_')}").parser() for name in cli.COMMANDS]
    found = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    return found | {flag.split(".")[0] for flag in found} | {"--version"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_that_a_page_names_exist(page: Path, flags: set[str]) -> None:
    """`--flag` in the text, alone or in a command of ours; the code blocks are parsed by the tests below."""
    for code in re.findall(r"`([^`]+)`", re.sub(FENCED, "", page.read_text())):
        if re.match(rf"--|(cli.py |mfkd )?({'|'.join(cli.COMMANDS)}) ", code):
            named = {flag.rstrip(".") for flag in re.findall(r"(?<!\S)--[a-z][\w.-]*", code)}
            assert named <= flags | OTHERS, code


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
            native = caltech21.RESOLUTION if values.data == "caltech21" else 224
            yield values.space, values.resolution or native, values.max_macs


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
