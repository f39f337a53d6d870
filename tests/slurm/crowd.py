"""A driver for the tests: `crowd.py FOLDER FLAGS`, flags of `search`, has all workers meet and prints who they are."""

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
    runner = open_fleet(resources, layout(resources), folder / "logs", module="tests.light")
    try:
        room = folder / "room"
        room.mkdir()
        task = {"folder": str(room), "count": runner.capacity}
        futures = [runner.submit("meet", task) for _ in range(runner.capacity)]
        print(json.dumps([future.result() for future in futures]))
    finally:
        runner.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
