"""A driver for the tests: `crowd.py FOLDER FLAGS` (of `search`) runs all workers at once, and prints who they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.commands import search
from engine.commands.flags import gather
from engine.config import Resources
from engine.fleet.devices import layout
from engine.fleet.fleet import open_fleet


def main(folder: Path, flags: list[str]) -> None:
    resources = gather(Resources, search.parser().parse_args(flags))
    fleet = open_fleet(resources, layout(resources), folder / "logs", module="tests.light")
    try:
        meeting = folder / "meeting"
        meeting.mkdir()
        task = {"folder": str(meeting), "count": fleet.capacity}
        futures = [fleet.submit("meet", task) for _ in range(fleet.capacity)]
        print(json.dumps([future.result() for future in futures]))
    finally:
        fleet.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
