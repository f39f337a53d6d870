"""What the documents say is there is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_lists_every_file_and_no_other() -> None:
    listed = set(re.findall(r"^\| `([^`]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    for name in listed:
        assert (ROOT / name).exists(), name
    engine = {f"engine/{p.name}{'/' if p.is_dir() else ''}" for p in (ROOT / "engine").iterdir()}
    engine -= {"engine/__init__.py", "engine/__pycache__/"}
    assert engine <= listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_pages_are_understood(page: Path) -> None:
    """Every `python cli.py ...` line parses: no flag that is misspelt or gone."""
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.split("#")[0].strip()
            if command.startswith("python cli.py "):
                cli.parse(command.removeprefix("python cli.py ").split())
