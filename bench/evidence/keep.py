"""Keeps what a study of bench/evidence measured, in docs/results, and writes the page again that shows it.

Run it as `python -m bench.evidence.keep build/evidence/NAME`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from bench.evidence import low_fidelities
from engine.run_folder import RunFolder
from engine.search.runs import open_run


def main(run_dir: Path) -> None:
    keep_study(run_dir)
    low_fidelities.main()


def keep_study(run_dir: Path) -> None:
    """Copies the raw results of a study, and adds the facts about its run to those of the others."""
    shutil.copyfile(RunFolder(run_dir).study_evaluations, low_fidelities.kept(run_dir.name))
    facts = low_fidelities.read_facts() | {run_dir.name: facts_of(run_dir)}
    low_fidelities.FACTS.write_text(json.dumps(dict(sorted(facts.items())), indent=1) + "\n")


def facts_of(run_dir: Path) -> dict[str, Any]:
    """The machine and versions of a study's last call, the number of classes, and its teacher."""
    run, card = open_run(str(run_dir)), teacher_card(run_dir)
    last = run.facts["calls"][-1]
    return {
        "classes": len(run.data.classes),
        "device": last["device"],
        "versions": {"Python": last["python"]}
        | {name: last["versions"][name] for name in ("torch", "nvidia-dali-cuda130")},
        "teacher": {name: card[name] for name in ("network", "accuracy", "seconds")},
    }


def teacher_card(run_dir: Path) -> dict[str, Any]:
    card = open_run(str(run_dir)).teacher_card()
    if card is None:
        raise SystemExit(f"{run_dir} has no teacher, or its file cannot be read")
    return card


if __name__ == "__main__":
    main(Path(sys.argv[1]))
