"""Fixtures shared by several test files: small data that a network can learn, real data, a finished run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: two test processes with two threads each would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that need it are skipped, with the reason, if it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return folder


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 16x16 images that differ in the height of a bright bar: 120 to train, 30 to test."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 3
        images = rng.integers(0, 120, (count, 16, 16, 3), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[5 * label : 5 * label + 4] += 120
        return images, labels

    (x_train, y_train), (x_test, y_test) = draw(120), draw(30)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[psutil.Process]]:
    """Marks this process; returns a function that lists the living processes, of any parent, with the same mark."""
    monkeypatch.setenv("MARK_OF_A_TEST", str(tmp_path))

    def marked() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                mark = process.environ().get("MARK_OF_A_TEST")
                if mark == str(tmp_path) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue  # gone in the meantime, or another user's
        return [process for process in found if process.pid != os.getpid()]

    return marked


@pytest.fixture
def heard() -> Iterator[None]:
    """Undoes that a script ignores INT in the background, and nohup HUP, for tests that send these signals."""
    ignored = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def final_rows(architecture: str, macs: int) -> dict[str, Any]:
    """What result.json says of a winner's final training and its baselines, one of which failed."""
    tested = {"test_accuracy": 0.9012, "test_standard_error": 0.0123, "test_images": 590, "epochs": 40}
    final = {"architecture": architecture, "macs": macs, "params": 900, "weights": "none", **tested}
    less = {"difference": 0.021, "difference_standard_error": 0.008, "test_accuracy": 0.8802}
    one = {**final, "name": "largest within the limits", "within_limits": True, "architecture": "3-3-3-3-3-2", **less}
    large = {"architecture": "3-3-3-3-3-3", "macs": 2 * macs, "within_limits": False}
    failure = {"status": "oom", "error": "no memory </script>"}
    baselines = [one, {**one, **large, "name": "largest network"}, {**large, **failure, "name": "unlucky network"}]
    return {"final": final, "baselines": baselines, "verdict": "The search was worth it: <it> was."}


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as `search` leaves it, made by its own loop and method; evaluations are a formula, one failed."""
    from concurrent.futures import Future

    from safetensors.numpy import save_file

    from engine.config import Budget, SearchConfig, Slots, search_plan
    from engine.run_folder import RunFolder
    from engine.search import class_scores, search
    from engine.search.journal import Journal
    from engine.search.loop import VirtualWorkers, drive
    from engine.search.methods.propose import winner
    from engine.search.run import write_run_file
    from engine.search.setup import space_members
    from engine.spaces.load import load_space
    from engine.tasks import DataFacts
    from engine.trial import Evaluation, Fidelity, Trial

    config = SearchConfig(
        space="nasbench201:channels=4,cells=1",
        low=Fidelity("low", epochs=2, kd_loss="kd"),
        high=Fidelity("high", epochs=20),
    )
    budget = Budget(max_low=14, max_high=9)
    mean, std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    data = DataFacts(tuple("abcde"), 16, mean, std, {"train": 80, "valid": 20}, fingerprint="f", device="cpu")
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "finished")
    folder.path.mkdir()
    folder.fix_config("search", config, budget, Slots(2, 1))
    write_run_file(folder, data)
    candidates, plan = space_members(load_space(config.space), config, data), search_plan(config, budget)

    def answer(trial: Trial) -> Evaluation:
        luck = np.random.default_rng(int(trial.key, 16)).normal(0, 0.01)
        quality = sum(option in (2, 3) for option in trial.architecture.choices) / 6
        row = candidates.row(trial.architecture)
        seconds = 100.0 if trial.fidelity == plan.high else 10.0
        return Evaluation(
            trial,
            "ok",
            (0.7 if trial.fidelity == plan.high else 0.5) + 0.2 * quality + luck,
            seconds=seconds,
            costs={"train": 0.7 * seconds, "teacher": 0.2 * seconds, "data": 0.05 * seconds, "images_per_s": 100.0},
            macs=int(candidates.macs[row]),
            params=int(candidates.params[row]),
            device="cpu",
            worker=f"worker {trial.number % 2}",
            started=1.7e9 + 50.0 * trial.number,
        )

    class Formula:
        def submit(self, trial: Trial) -> Future[Evaluation]:
            evaluation = answer(trial)
            if trial.number == 3:
                evaluation = Evaluation(trial, "oom", seconds=5.0, error="no memory left </script>", started=1.7e9)
            journal.answer(evaluation)
            future: Future[Evaluation] = Future()
            future.set_result(evaluation)
            return future

        def flush(self) -> None:
            return None

    with Journal(folder.journal) as journal:
        history = drive(
            lambda seen, free: search.propose(candidates, seen, plan, free),
            Formula(),
            VirtualWorkers(2, lambda trial: trial.fidelity.cost()),
            asked=journal.ask,
        )
    best = winner(candidates, history, plan)
    assert best is not None
    ok = [e for e in history.answered if e.ok]
    result = {
        "run_dir": str(folder),
        "status": "finished",
        "winner": {
            "architecture": str(best.trial.architecture),
            "valid_accuracy": best.accuracy,
            "test_accuracy": 0.8765,
            "macs": best.macs,
            "params": best.params,
            "valid_standard_error": 0.05,
            "test_standard_error": 0.01,
        },
        **final_rows(str(best.trial.architecture), best.macs),
        "evaluations": {
            "low": sum(e.trial.fidelity == config.low for e in ok),
            "high": sum(e.trial.fidelity == config.high for e in ok),
            "failed": 1,
        },
        "tau": {"low_vs_high": None, "macs_vs_high": None},
        "seconds": 1000.0,
    }
    folder.result.write_text(json.dumps(result))
    counts = [[4, 1, 0, 0, 0], [0, 5, 0, 0, 0], [0, 2, 3, 0, 0], [0, 0, 0, 5, 0], [1, 0, 0, 0, 4]]
    class_scores.save(folder, best, "test", class_scores.class_scores(data.classes, counts))
    card = {"network": f"{config.space}#3-3-3-3-3-3", "accuracy": 0.9, "seconds": 60.0, "losses": [1.6, 1.1, 0.8]}
    folder.teacher.parent.mkdir()
    save_file({"w": np.zeros(1, np.float32)}, folder.teacher, {"card": json.dumps(card)})
    return folder.path
