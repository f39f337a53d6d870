"""Reading a run: its folder, `status`, `trials`, `explain`, and what the surrogate predicted when."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import cli
from engine.run_folder import RunFolder
from engine.search import predictions, runs
from engine.search.activity import duration
from engine.search.journal import Journal
from engine.search.predictions import load_predictions
from engine.search.progress import Display
from engine.tasks import Activity, task_to_json
from engine.trial import EngineError, UsageError


@pytest.fixture
def copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def command(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints on stdout."""
    assert cli.main(line.split()) == 0
    return capsys.readouterr().out


def test_a_run_is_found_by_its_folder_and_by_its_name(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(finished_run)
    monkeypatch.chdir(tmp_path)
    assert runs.find_run("mine").path.samefile(runs.find_run(str(finished_run)).path)
    with pytest.raises(UsageError, match=r"no run named 'nine'.*runs/ has mine"):
        runs.find_run("nine")


def test_a_run_of_another_version_is_refused(copy: Path) -> None:
    path = copy / "config.yaml"
    path.write_text(path.read_text().replace("momentum:", "momentums:"))
    with pytest.raises(EngineError, match=r"written by another version.*momentums"):
        runs.open_run(str(copy))


def test_a_run_without_its_journal_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "journal.jsonl").unlink()
    assert cli.main(["status", str(copy)]) == 2
    assert "has no journal.jsonl" in capsys.readouterr().err


def test_a_run_without_evaluations_says_so(copy: Path) -> None:
    (copy / "journal.jsonl").write_text('{"journal":1}\n')
    run = runs.open_run(str(copy))
    with pytest.raises(UsageError, match="has no evaluations yet"):
        runs.with_answers(run)
    assert run.best is None


def test_a_result_older_than_the_journal_is_not_shown_as_the_winner(copy: Path) -> None:
    assert runs.open_run(str(copy)).result is not None
    lines = (copy / "journal.jsonl").read_text().splitlines(keepends=True)
    again = json.loads(lines[-1])
    again["answered"]["trial"]["number"] = 999
    (copy / "journal.jsonl").write_text("".join(lines) + json.dumps(again) + "\n")
    run = runs.open_run(str(copy))
    assert run.result is None
    assert run.best is not None
    assert run.best.accuracy == max(e.accuracy for e in run.at(run.plan.high))


def test_status_tells_the_state_of_a_run(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = json.loads(command(f"status {copy} --json", capsys))
    assert state["state"] == "finished"
    assert state["evaluations"]["high"]["ok"] == state["evaluations"]["high"]["limit"] == 9
    assert state["evaluations"]["low"]["failed"] == 1
    assert state["winner"]["test_accuracy"] == 0.8765
    with Journal(copy / "journal.jsonl"):  # as a search holds it
        assert json.loads(command(f"status {copy} --json", capsys))["state"] == "running"
    (copy / "result.json").unlink()
    screen = command(f"status {copy}", capsys)
    assert "not running on this machine" in screen
    assert "best so far" in screen
    assert "oom: no memory left" in screen


def activity(copy: Path, **fields: Any) -> Activity:
    """An activity as a worker of the run would write it."""
    one = Activity(**{"at": time.time(), **fields})
    folder = RunFolder(copy)
    folder.activities.mkdir(parents=True, exist_ok=True)
    folder.activity(one.worker).write_text(json.dumps(task_to_json(one)))
    return one


def test_status_and_lines_tell_what_the_workers_are_doing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "result.json").unlink()
    busy = {"epoch": 3, "epochs": 20, "loss": 1.25, "images_per_s": 1234.5, "seconds_left": 95.0}
    teacher = activity(copy, worker="node/0/0", phase="teacher", **busy)
    said = "epoch 4 of 20, loss 1.250, 1,234 images/s, 1 min 35 s left"
    state = json.loads(command(f"status {copy} --json", capsys))
    assert (state["phase"], state["activities"][0]["epoch"]) == ("teacher", 3)
    assert f"teacher: {said}" in " ".join(command(f"status {copy}", capsys).split())
    with Display("lines") as display:
        display.show_activities([teacher])
        display.show_activities([teacher])  # not again so soon
    assert capsys.readouterr().err.count(f"teacher: {said}") == 1
    for number in range(9):  # a line each would be too many
        more = busy | {"epoch": number, "loss": 1 + number, "seconds_left": 60.0 - number}
        activity(copy, worker=f"node/0/{number}", phase="high", numbers=(number,), networks=("1-0-0-0-0-0",), **more)
    screen = " ".join(command(f"status {copy}", capsys).split())
    assert "full: 9 networks, epoch 1 to 9 of 20, loss 1.000 to 9.000" in screen
    assert "the next done in 52 s" in screen
    activity(copy, worker="node/0/0", phase="low", at=time.time() - 300)
    (copy / "logs/activities/node-0-1.json").write_text("{")  # damaged, or of another version
    assert "low: last heard of 5 min 0 s ago" in " ".join(command(f"status {copy}", capsys).split())


def test_a_duration_never_says_60_of_a_unit() -> None:
    said = [duration(seconds) for seconds in (59.4, 59.7, 119.4, 119.6, 3599.4, 3599.7, 7199.9)]
    assert said == ["59 s", "1 min 0 s", "1 min 59 s", "2 min 0 s", "59 min 59 s", "1 h 0 min", "2 h 0 min"]


def test_status_watch_ends_with_a_run_that_is_stopped(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "result.json").unlink()
    search, waits = ExitStack(), 0

    def wait(seconds: float) -> None:
        nonlocal waits
        waits += 1
        if waits == 2:
            search.close()

    monkeypatch.setattr("time.sleep", wait)
    with search:
        search.enter_context(Journal(copy / "journal.jsonl"))
        assert "not running on this machine" in command(f"status {copy} --watch", capsys)
    assert waits == 2


def test_explain_takes_the_winner_by_that_name(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = json.loads(command(f"explain {copy} winner --json", capsys))
    assert said["architecture"] == json.loads((copy / "result.json").read_text())["winner"]["architecture"]
    (copy / "result.json").unlink()
    assert cli.main(["explain", str(copy), "winner"]) == 2
    assert "has no winner yet" in capsys.readouterr().err


def test_status_watches_until_the_search_ends(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "result.json").rename(copy / "kept.json")
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            (copy / "kept.json").rename(copy / "result.json")

    monkeypatch.setattr("time.sleep", wait)
    assert "finished" in command(f"status {copy} --watch", capsys)
    assert len(waits) == 2


def test_text_in_brackets_is_printed_verbatim(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "journal.jsonl"
    path.write_text(path.read_text().replace("no memory left", "[enforce fail] [/data/x] left"))
    (copy / "result.json").unlink()
    assert "oom: [enforce fail] [/data/x] left" in command(f"status {copy}", capsys)


def test_a_damaged_configuration_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "config.yaml").write_text("config: [1\n")
    assert cli.main(["status", str(copy)]) == 3
    assert f"cannot read {copy / 'config.yaml'}" in capsys.readouterr().err


def test_a_fidelity_study_is_distinguished_from_a_search(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "config.yaml"
    path.write_text(path.read_text().replace("kind: search", "kind: fidelity-study"))
    (copy / "result.json").unlink()
    (RunFolder(copy).study_result).write_text('{"complete": false}')
    assert json.loads(command(f"status {copy} --json", capsys))["state"] == "stopped"
    asked = len(runs.open_run(str(copy)).record.asked)
    (RunFolder(copy).study_result).write_text(json.dumps({"complete": True, "evaluations": asked}))
    assert "finished" in command(f"status {copy} --watch", capsys)
    architecture = runs.open_run(str(copy)).answers[0].trial.architecture
    assert "asks no surrogate; this is one of them" in command(f"explain {copy} {architecture}", capsys)
    assert cli.main(["export", str(copy)]) == 2
    assert "is a fidelity study, which has no winner" in capsys.readouterr().err


def test_a_run_can_be_read_while_a_line_is_being_written(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    assert json.loads(command(f"status {copy} --json", capsys))["evaluations"]["low"]["pending"] == 1
    assert "pending" in command(f"trials {copy}", capsys)


def test_trials_are_filtered_sorted_and_cut(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def listed(options: str) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = json.loads(command(f"trials {finished_run} --json {options}", capsys))["trials"]
        return rows

    everything = listed("")
    high = listed("--fidelity high --sort accuracy")
    accuracies = [one["accuracy"] for one in high]
    assert accuracies == sorted(accuracies, reverse=True)  # type: ignore[type-var]
    assert {one["fidelity"] for one in high} == {"high"}
    assert [one["number"] for one in listed("--status failed")] == [3]
    assert listed("--status oom") == listed("--status failed")
    assert len(listed("--status ok")) == len(everything) - 1
    assert (
        listed("--limit 2 --sort macs")
        == sorted(
            (one for one in everything if one["macs"] is not None),
            key=lambda one: one["macs"],  # type: ignore[arg-type, return-value]
        )[:2]
    )
    some = str(everything[0]["architecture"])
    assert {one["architecture"] for one in listed(f"--arch {some[:-2]}*")} >= {some}


def test_trials_as_csv_hold_every_column(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(csv.DictReader(io.StringIO(command(f"trials {finished_run} --csv", capsys))))
    run = runs.open_run(str(finished_run))
    assert [float(row["accuracy"] or 0) for row in rows] == [e.accuracy for e in run.answers]
    assert rows[3]["error"] == "no memory left </script>"
    assert {"macs", "params", "seconds", "train_seconds", "images_per_s", "worker", "started"} <= set(rows[0])


def test_a_prediction_has_not_seen_what_came_after_it(copy: Path) -> None:
    """Outcomes unknown when a trial was asked do not change the prediction for it."""
    before = load_predictions(runs.open_run(str(copy))).at_ask_time()
    run = runs.open_run(str(copy))
    known = dict(zip((trial.number for trial in run.record.asked), run.record.known, strict=True))
    middle = list(before)[len(before) // 2]
    seen, lines = 0, []
    for line in (copy / "journal.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "answered" in entry:
            seen += 1
            if seen > known[middle] and entry["answered"]["trial"]["fidelity"]["name"] == "high":
                entry["answered"]["accuracy"] = 1 - entry["answered"]["accuracy"]
        lines.append(json.dumps(entry))
    (copy / "journal.jsonl").write_text("\n".join(lines) + "\n")
    after = load_predictions(runs.open_run(str(copy))).at_ask_time()
    early = [number for number in before if known[number] <= known[middle]]
    assert early[-1] == middle
    assert [after[number] for number in early] == [before[number] for number in early]
    assert after != before


def test_the_first_full_trainings_were_the_surrogate_s_best(finished_run: Path) -> None:
    said = load_predictions(runs.open_run(str(finished_run))).at_ask_time()
    first = said[min(said)]
    assert first.full == 0
    assert first.rank <= 3
    assert first.among == 6466  # the networks of the space that differ


def explained(run: Path, architecture: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(command(f"explain {run} {architecture} --json", capsys))
    return found


def test_explain_says_why_an_architecture_was_trained_in_full(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = runs.open_run(str(finished_run)).best
    assert best is not None
    found = explained(finished_run, str(best.trial.architecture), capsys)
    assert best.accuracy in [one["accuracy"] for one in found["evaluations"]]  # type: ignore[attr-defined]
    assert "It was promoted to full training: its upper bound then ranked" in found["why"][0]  # type: ignore[index]
    assert found["predicted_at_the_end"]["fitted_to_its_full_score"]  # type: ignore[index]
    assert found["predicted_when_asked"]["full"] < found["predicted_at_the_end"]["full"]  # type: ignore[index]
    weights = found["weights"]
    assert [weight["name"] for weight in weights] == ["macs", "low fidelity"]  # type: ignore[attr-defined]
    assert all(weight["std"] > 0 and weight["included"] == 1 for weight in weights)  # type: ignore[attr-defined]
    text = command(f"explain {finished_run} {best.trial.architecture}", capsys)
    assert "surrogate when asked for" in text
    assert "What this run has learned to trust" in text
    assert f"  macs          {weights[0]['mean']:+.2f} ± {weights[0]['std']:.2f}\n" in text  # type: ignore[index]
    assert "1<-0 = nor_conv" in text


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("0-0-0-1-0-0", "It was never evaluated"),
        ("1-3-3-2-3-3", "it is the same network as 3-3-1-2-1-3"),
    ],
)
def test_explain_says_why_an_architecture_was_not_trained_in_full(
    finished_run: Path, architecture: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explained(finished_run, architecture, capsys)
    assert found["evaluations"] == []
    assert reason in " ".join(found["why"])  # type: ignore[arg-type]


def test_explain_says_that_a_failed_one_is_not_asked_again(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.open_run(str(copy))
    full = {trial.architecture for trial in run.record.asked if trial.fidelity == run.plan.high}
    low = next(e.trial for e in run.answers if e.trial.architecture not in full)
    path = copy / "journal.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    answered = next(one for one in entries if one.get("answered", {}).get("trial", {}).get("number") == low.number)
    answered["answered"] |= {"status": "oom", "accuracy": 0.0, "error": "no memory left"}
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    why = " ".join(explained(copy, str(low.architecture), capsys)["why"])  # type: ignore[arg-type]
    assert "Its evaluation failed, and failed evaluations are not repeated. It was not trained in full" in why


def test_explain_says_that_an_architecture_exceeds_the_limits(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    past = load_predictions(runs.open_run(str(copy)))
    asked = {trial.architecture for trial in past.run.record.asked}
    by_size = map(past.candidates.architecture, past.candidates.params.argsort()[::-1])
    other = next(architecture for architecture in by_size if architecture not in asked)
    path = copy / "config.yaml"
    path.write_text(path.read_text().replace("max_params: .inf", "max_params: 5000.0"))
    why = explained(copy, str(other), capsys)["why"]
    assert re.search(r"does not meet the limits .*parameters exceed --max-params 5000\)", why[0])  # type: ignore[index]


@pytest.mark.parametrize("limit", [".inf", "1.0e+9"])
def test_explain_knows_a_candidate_outside_the_sample_of_a_large_space(
    limit: str, copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy / "config.yaml"
    path.write_text(path.read_text().replace("max_macs: .inf", f"max_macs: {limit}"))
    every = load_predictions(runs.open_run(str(copy))).candidates
    monkeypatch.setattr(predictions, "SAMPLE", 50)
    past = load_predictions(runs.open_run(str(copy)))
    left_out = next(one for one in map(every.architecture, range(len(every))) if past.candidates.row(one) is None)
    found = explained(copy, str(left_out), capsys)
    said = " ".join(found["why"])  # type: ignore[arg-type]
    assert "It was never evaluated: other candidates promised more" in said
    assert f"of the {len(every):,} candidates, drawn at random" in said
    assert found["predicted_at_the_end"] is not None


def test_explain_says_that_an_architecture_is_not_in_the_pool_of_a_huge_space(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = load_predictions(runs.open_run(str(copy))).candidates
    path = copy / "config.yaml"
    path.write_text(path.read_text().replace("max_macs: .inf", "max_macs: 1.0e+9"))
    monkeypatch.setattr("engine.space.POOL", 4000)
    past = load_predictions(runs.open_run(str(copy)))
    left_out = next(one for one in map(every.architecture, range(len(every))) if past.candidates.row(one) is None)
    why = explained(copy, str(left_out), capsys)["why"]
    assert "a random sample of the 15,625 architectures in the space" in why[0]  # type: ignore[index]


def test_an_architecture_that_was_too_slow_has_not_failed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "journal.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    answered = [entry["answered"] for entry in entries if "answered" in entry]
    slow = next(one for one in answered if one["trial"]["fidelity"]["name"] == "high" and one["trial"]["seed"] == 0)
    slow |= {"status": "too_slow", "accuracy": 0.0, "error": "measured 9 ms, over --max-latency-ms 5"}
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    state = json.loads(command(f"status {copy} --json", capsys))["evaluations"]
    assert (state["high"]["too_slow"], state["high"]["failed"], state["low"]["failed"]) == (1, 0, 1)
    name = "-".join(map(str, slow["trial"]["architecture"]))
    assert "It was not trained: measured 9 ms" in " ".join(explained(copy, name, capsys)["why"])  # type: ignore[arg-type]


def test_the_candidates_of_a_limit_on_latency_are_those_of_the_search(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = load_predictions(runs.open_run(str(copy))).candidates
    rows = every.macs.argsort()[:: len(every) // 30]
    taken = {str(every.architecture(row)): float(every.macs[row]) / 1e5 for row in rows}
    (copy / "latency.json").write_text(json.dumps({"milliseconds": taken}))
    path = copy / "config.yaml"
    middle = float(every.macs[rows[15]]) / 1e5
    path.write_text(path.read_text().replace("max_latency_ms: .inf", f"max_latency_ms: {middle}"))
    fast = load_predictions(runs.open_run(str(copy)))
    assert 0.3 < fast.everything / len(every) < 0.6
    assert fast.candidates.macs.max() <= 1.1e5 * middle
    asked = {trial.architecture for trial in fast.run.record.asked}
    slowest = next(one for one in map(every.architecture, every.macs.argsort()[::-1]) if one not in asked)
    assert "ms exceed --max-latency-ms" in explained(copy, str(slowest), capsys)["why"][0]  # type: ignore[index]


def test_explain_refuses_an_architecture_of_another_space(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", str(finished_run), "1-2"]) == 2
    assert "has 2 choices" in capsys.readouterr().err
