"""`train`, `eval` and `export` with a user's own images and space, as in docs/data.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import cli
from engine.commands import eval as eval_command
from engine.commands import train as train_command
from engine.search.runs import open_run

SMALL = "1-0-0-0-0-0-0-0-0"
HERE = ["--device", "cpu", "--progress", "none"]


def photos(folder: Path, images: int, names: tuple[str, ...] = ("dark", "light", "striped")) -> Path:
    """A folder of images with distinguishable classes, several sizes and both formats."""
    rng = np.random.default_rng(0)
    for part, count in (("train", images), ("test", images // 2)):
        for label, name in enumerate(names):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 100, (40, 50 + number % 3, 3), dtype=np.uint8)
                pixels[:: 2 if label == 2 else 1] += 155 * min(label, 1)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.{'png' if number % 2 else 'jpg'}")
    return folder


def called(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> Any:
    assert cli.main([*map(str, arguments)]) == code
    printed = capsys.readouterr()
    return json.loads(printed.out.splitlines()[-1]) if code == 0 else printed.err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder made by `train` on a folder of images."""
    base = tmp_path_factory.mktemp("own")
    data = photos(base / "photos", 16)
    (data / "train/dark/drawing.psd").touch()
    out = base / "run"
    line = ["train", "--space", "examples/my_space.py:SPACE", "--arch", SMALL, "--data", data, "--resolution", "32"]
    line += ["--epochs", "6", "--lr", "0.05", "--batch-size", "8", "--out", out, "--workers", "1", *HERE]
    assert cli.main([*map(str, line)]) == 0
    return out


def test_train_makes_a_run_with_a_winner(run: Path) -> None:
    found = open_run(str(run))
    (evaluation,) = found.answers
    assert str(evaluation.trial.architecture) == SMALL
    assert evaluation.trial.fidelity.epochs == 6
    assert found.result is not None
    assert found.result["winner"]["test_accuracy"] > 0.8  # of three classes
    assert Path(found.result["winner"]["weights"]).is_file()


def test_a_run_tells_what_images_it_found(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In run.json, in the report, and for the data that `eval` reads."""
    passed = "passed over 1: train/dark/drawing.psd (not read; convert it to JPEG)"
    summary = f"38 train, 10 valid, 24 test, 3 classes; {passed}"
    assert open_run(str(run)).data.summary == summary
    assert cli.main(["report", str(run)]) == 0
    assert summary in (run / "report/index.html").read_text()
    capsys.readouterr()
    newer = photos(tmp_path / "newer", 4)
    (newer / "test").rename(newer / "val")
    (newer / "train/dark/.DS_Store").touch()
    found = called(capsys, "eval", run, "--data", newer, *HERE)
    assert found["notes"] == ["val/ is the test part", "passed over 1: train/dark/.DS_Store (hidden)"]


def test_another_data_set_with_the_same_classes_can_be_scored(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = photos(tmp_path / "newer", 4)
    found = called(capsys, "eval", run, "--split", "test", "--data", newer, *HERE)
    assert found["images"] == 6
    assert found["accuracy"] > 0.6
    assert called(capsys, "eval", run, "--split", "all", "--data", newer, *HERE)["images"] == 18
    assert found["data"] == str(newer)
    others = photos(tmp_path / "others", 4, ("dark", "light", "dotted"))
    said = called(capsys, "eval", run, "--data", others, *HERE, code=2)
    assert "has the classes dark, dotted, light, but the network was trained on dark, light, striped" in said


def test_eval_shows_each_class_and_keeps_the_winners_scores_for_the_report(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = json.loads((run / "class-scores.json").read_text())["test"]  # written when the run was finished
    assert cli.main(["eval", str(run), "--split", "test", "--device", "cpu", "--progress", "lines"]) == 0
    out, err = capsys.readouterr()
    brief = json.loads(out)
    assert "confusion" not in brief
    for word in ("striped", "right", "true / given", f"± {brief['standard_error']:.4f}"):
        assert word in err
    whole = called(capsys, "eval", run, "--split", "test", "--json", *HERE)
    assert whole["confusion"] == stored["confusion"]
    assert sum(map(sum, whole["confusion"])) == whole["images"] == 24
    right = [whole["confusion"][place][place] for place in range(3)]
    assert [row["right"] for row in whole["classes"]] == right
    assert whole["accuracy"] == sum(right) / 24 == brief["accuracy"]
    called(capsys, "eval", run, "--data", photos(tmp_path / "newer", 4), *HERE)  # of other images: not the run's own
    assert set(json.loads((run / "class-scores.json").read_text())) == {"test"}
    assert called(capsys, "eval", run, *HERE)["split"] == "valid"
    assert set(json.loads((run / "class-scores.json").read_text())) == {"test", "valid"}


def test_predictions_of_test_images_are_what_eval_counts(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the run and from its export; a 16-bit PNG, a GIF, and files that are no images beside them."""
    data = Path(open_run(str(run)).config.data)
    (row,) = called(capsys, "eval", run, "--split", "test", "--json", *HERE)["confusion"][:1]
    found = called(capsys, "predict", run, data / "test" / "dark", "--json", "--top", "3", "--device", "cpu")
    first = [image["classes"][0]["class"] for image in found["images"]]
    assert [first.count(name) for name in ("dark", "light", "striped")] == row
    assert all(sum(one["probability"] for one in image["classes"]) == pytest.approx(1) for image in found["images"])
    if not (run / "export").exists():
        called(capsys, "export", run, *HERE)
    again = called(capsys, "predict", run / "export" / SMALL, data / "test" / "dark", "--json", "--top", "3")
    for one, other in zip(found["images"], again["images"], strict=True):
        assert one["file"] == other["file"]
        assert {c["class"]: c["probability"] for c in one["classes"]} == pytest.approx(
            {c["class"]: c["probability"] for c in other["classes"]}, abs=1e-4
        )
    Image.new("L", (90, 30), 250).save(tmp_path / "light.gif")
    Image.fromarray(np.full((40, 40), 62_000, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "notes.jpg").write_text("no image")
    names = [str(tmp_path / name) for name in ("notes.jpg", "light.gif", "gone.png", "deep.png")]
    assert cli.main(["predict", str(run), *names, "--device", "cpu"]) == 3
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert [line[:2] for line in lines] == [[names[1], "light"], [names[3], "light"]]
    assert "2 of 4 files cannot be read as an image" in err
    assert f"{names[0]}: not an image, despite its name" in err
    assert f"{names[2]}: does not exist" in err


def test_training_starts_from_the_weights_of_a_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = ["train", run, "--weights", "run", "--epochs", "1", "--lr", "1e-9", "--workers", "1", *HERE]
    found = called(capsys, *tuned, "--out", tmp_path / "tuned")
    before, after = (load_file(path) for path in (open_run(str(run)).result["winner"]["weights"], found["weights"]))
    for name, value in before.items():
        if name.endswith("weight"):
            np.testing.assert_allclose(after[name], value, atol=1e-5)
    settings = open_run(str(tmp_path / "tuned")).config
    assert (settings.space, settings.batch_size) == ("examples/my_space.py:SPACE", 8)
    said = called(capsys, *tuned, "--lr", "0.1", "--out", tmp_path / "tuned", code=2)
    assert "holds a search with other settings (lr: 1e-09 there, 0.1 here)" in said


def test_the_export_of_a_run_is_complete(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = called(capsys, "export", run, *HERE)
    assert found["folder"] == str(run / "export" / SMALL)
    assert max(found["differences"].values()) <= 1e-4
    card = (run / "export" / SMALL / "README.md").read_text()
    winner = open_run(str(run)).result["winner"]
    for text in (
        "38 train, 10 valid, 24 test, 3 classes; passed over 1: train/dark/drawing.psd",
        f"{100 * winner['valid_accuracy']:.2f} %",
        f"{100 * winner['test_accuracy']:.2f} %",
        "6 epochs on all images",
        "dark, light, striped",
        "| teacher | none |",
    ):
        assert text in card, text
    assert (run / "export" / SMALL / "model.py").is_file()
    for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL):  # pasted as a reader of the card would
        folder = run / "export" / SMALL
        Image.new("RGB", (90, 70), (255, 255, 255)).save(folder / "image.jpg")
        said = subprocess.run([sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stderr
    assert said.stdout.strip() == "light"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            ["export", "RUN", "--arch", "0-0-0-0-0-0-0-0-0"],
            rf"was not trained in full in .* \(trained in full: {SMALL}\); train it: ",
        ),
        (["export", "RUN", "--arch", "1-0"], "has 2 choices"),
        (["export", "nowhere"], "no run named 'nowhere'"),
        (["train"], "name an architecture with --arch 3-1-0-2-4-3, or a RUN"),
        (["train", "--arch", "1-0", "--weights", "run"], "--weights run needs a RUN"),
        (["train", "RUN", "--weights", "none.safetensors", "--out", "OUT"], "no weights file .*none.safetensors"),
        (["train", "RUN", "--weights", __file__, "--out", "OUT"], "holds no weights: give a .safetensors"),
        (["trials", "RUN", "--limit", "-1"], "--limit is -1; give a number of rows, or 0 for all"),
        (["predict", "RUN", "OUT", "--top", "0"], "--top 0: give a number of classes"),
        (["predict", "nowhere", "OUT"], "no run named 'nowhere'"),
        (["eval"], "nothing to score: give a RUN, or --space, --arch, --weights and --data"),
    ],
)
def test_mistakes_say_what_to_do(
    line: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [{"RUN": str(run), "OUT": str(tmp_path / "out")}.get(word, word) for word in line]
    options = {"predict": HERE[:2], "trials": []}.get(line[0], HERE)
    assert re.search(message, called(capsys, *words, *options, code=2))


def test_flags_override_those_of_a_run(run: Path) -> None:
    parser = train_command.parser()
    for given in ([str(run), "--epochs", "9"], ["--epochs", "9", str(run)], ["-q", str(run), "--epochs=9"]):
        line = train_command.with_defaults(parser, given)
        assert line[-len(given) :] == given
        assert {"--epochs=6", "--lr=0.05"} <= set(line[: -len(given)])
        assert parser.parse_args(line).epochs == 9
    assert "--resolution=32" in eval_command.with_defaults(eval_command.parser(), [str(run)])
    assert train_command.with_defaults(parser, ["--arch", "1"]) == ["--arch", "1"]
