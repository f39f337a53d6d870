"""Recipes: defaults beneath the user's settings, numbers for what is left to auto, and fine-tuned teachers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import cli
import mfkd
from engine.config import SearchConfig, left_to_auto
from engine.networks import library
from engine.recipes import default_config, resolve, teacher_config
from engine.run_folder import RunFolder
from engine.tasks import TeacherFacts, TeacherTask, WorkerSettings, task_from_json, task_to_json
from engine.training import teacher
from engine.training.run_tasks import run_teacher
from engine.trial import Drained, Fidelity, UsageError

SPACE = "tests/pretrained_space.py:SPACE"
PLAIN = "nasbench201:channels=4,cells=1"


def settings(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What `config` says: {key: {value, from}}."""
    assert cli.main(["config", "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_recipe_lies_beneath_files_and_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("weight_decay: 0.2\nlow:\n  epochs: 5\n")
    found = settings(capsys, f"--space={SPACE}", f"-c={tmp_path / 'mine.yaml'}", "--lr=0.1")
    assert found["lr"] == {"value": 0.1, "from": "command line"}, "also if it is the default of the other recipe"
    assert found["weight_decay"] == {"value": 0.2, "from": str(tmp_path / "mine.yaml")}
    assert found["low.epochs"]["value"] == 5
    assert found["optimizer"] == {"value": "adamw", "from": "recipe"}
    assert found["high.kd_loss"] == {"value": "kd", "from": "recipe"}


@pytest.mark.parametrize(
    ("arguments", "optimizer"),
    [
        ([f"--space={SPACE}"], "adamw"),
        ([f"--space={PLAIN}"], "sgd"),
        ([f"--space={SPACE}", "--recipe=scratch"], "sgd"),
        ([f"--space={PLAIN}", "--recipe=finetune"], "adamw"),
    ],
)
def test_auto_fine_tunes_where_weights_are_inherited(
    arguments: list[str], optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settings(capsys, *arguments)["optimizer"]["value"] == optimizer


def test_a_batch_job_gets_the_settings_that_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a value that is the default without the recipe."""
    words = [f"--space={SPACE}", "--data=photos/", "--lr=0.1", "--gpus=1", "--time=1:00:00", "--name=mine"]
    _, values = cli.parse(["submit", "slurm", *words])
    from engine.commands.submit import search_arguments

    _, in_job = cli.parse(search_arguments(values))
    _, here = cli.parse(["search", *words[:3]])
    assert in_job.lr == here.lr == 0.1
    assert in_job.optimizer == here.optimizer == "adamw"
    assert in_job.low == here.low


@pytest.mark.parametrize(("images", "batch_size"), [(6, 2), (48, 8), (640, 32), (100_000, 32)])
def test_any_number_of_images_gives_batches_and_epochs(images: int, batch_size: int) -> None:
    config = resolve(default_config(SearchConfig(space=SPACE)), images)
    assert not left_to_auto(config)
    assert config.batch_size == batch_size <= images
    assert config.low.epochs < config.high.epochs < config.teacher_epochs


def test_fewer_images_take_more_epochs_and_fewer_steps() -> None:
    few, many = (resolve(default_config(SearchConfig(space=SPACE)), images) for images in (200, 3200))
    assert many.high.epochs < few.high.epochs
    assert few.high.epochs * 200 < many.high.epochs * 3200


def test_from_scratch_the_defaults_are_numbers_but_for_small_data() -> None:
    config = resolve(SearchConfig(), 5000)
    assert (config.batch_size, config.teacher_epochs, config.low.epochs, config.high.epochs) == (64, 20, 20, 60)
    plain = SearchConfig()
    assert replace(config, batch_size=0, final=replace(config.final, epochs=0)) == plain
    assert config.final.epochs == 2 * plain.high.epochs
    assert resolve(SearchConfig(), 48).batch_size == 32


def test_the_numbers_of_a_run_stay_when_it_is_resumed(tmp_path: Path) -> None:
    recorded = {"batch_size": 16, "teacher_epochs": 3, "low": {"epochs": 1}, "high": {"epochs": 7}}
    config = default_config(SearchConfig(space=SPACE))
    again = resolve(replace(config, low=replace(config.low, epochs=9)), 1000, recorded)
    assert (again.batch_size, again.teacher_epochs, again.high.epochs) == (16, 3, 7)
    assert again.low.epochs == 9, "what the user gives is not overridden"


def test_only_a_pretrained_teacher_is_fine_tuned_beside_students_from_scratch() -> None:
    config = resolve(SearchConfig(space=PLAIN, teacher="torchvision:resnet18", lr=0.3), 1000)
    assert teacher_config(config, fine_tuned=True).optimizer == "adamw"
    assert teacher_config(config, fine_tuned=False) == config
    mine = replace(config, space=SPACE, recipe="finetune")
    assert teacher_config(mine, fine_tuned=True) == mine, "then the user's settings are those of the teacher too"


class Finetuning:
    """Fine-tunes a library's network on tiny images, from weights in a file."""

    def __init__(self, tiny_npz: Path, tmp_path: Path) -> None:
        torch.manual_seed(0)
        self.other, self.path = library.network("torchvision:squeezenet1_1", 7), tmp_path / "t.safetensors"
        self.file = tmp_path / "seven.safetensors"
        save_file(self.other.state_dict(), self.file)
        config = SearchConfig(space=PLAIN, data=str(tiny_npz), resolution=32, data_backend="resident", teacher_epochs=3)
        self.worker = WorkerSettings(config, tmp_path, "cpu")

    def run(self, **changed: Any) -> TeacherFacts:
        worker = replace(self.worker, config=replace(self.worker.config, **changed))
        task = TeacherTask(worker, "torchvision:squeezenet1_1", self.path, "finetune", self.file)
        return task_from_json(TeacherFacts, run_teacher(json.loads(json.dumps(task_to_json(task)))))


def test_a_library_network_is_fine_tuned_on_other_classes(tiny_npz: Path, tmp_path: Path) -> None:
    """It keeps the normalisation of its weights, and learns from where they are."""
    tuned = Finetuning(tiny_npz, tmp_path)
    facts, card = tuned.run(), teacher.read_card(tuned.path)
    assert (facts.epochs, len(card.classes), len(card.losses)) == (3, 3, 3)
    assert (card.mean, card.std) == library.normalisation("torchvision:squeezenet1_1")
    now, before = teacher.load(tuned.path).state_dict(), tuned.other.state_dict()
    moved = [(now[f"model.{name}"] - value).abs().mean() for name, value in before.items() if "classifier" not in name]
    assert max(moved) > 0, "no layer is frozen"
    assert max(moved) < 0.02, "AdamW moves a weight by at most its rate in a step: these start from the file"


def test_an_interrupted_fine_tuning_comes_to_the_same_weights(
    tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = Finetuning(tiny_npz, tmp_path)
    tuned.run()
    whole = tuned.path.rename(tmp_path / "whole.safetensors")
    monkeypatch.setattr("engine.training.context._work_wanted", lambda: False)
    for _ in range(2):
        with pytest.raises(Drained, match="epoch"):
            tuned.run()
    monkeypatch.undo()
    tuned.run()
    one, other = teacher.load(whole).state_dict(), teacher.load(tuned.path).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def run_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main([*arguments, "--device=cpu", "--progress=none"])
    found = capsys.readouterr()
    return code, found.out + found.err


def test_the_teacher_of_a_pretrained_space_is_its_largest_member(
    tiny_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fine-tuned on the data's normalisation, as the members that inherit from it will see them; `teacher_weights`
    are where it starts."""
    out = tmp_path / "t.safetensors"
    words = ["teacher", f"--space={SPACE}", f"--data={tiny_npz}", f"--out={out}", "--data-backend=resident"]
    assert run_command([*words, "--teacher-epochs=1", "--lr=1e-6"], capsys)[0] == 0
    card, weights = teacher.read_card(out), teacher.load(out).state_dict()
    assert card.network == f"{SPACE}#2"
    from tests.pretrained_space import start

    torch.testing.assert_close(weights["stem.0.weight"], start(3, None).stem[0].weight, atol=1e-4, rtol=0)
    torch.save({name: value + 1 for name, value in weights.items()}, tmp_path / "w.pt")
    out.unlink()
    more = ["--teacher-epochs=1", "--lr=1e-6", f"--teacher-weights={tmp_path / 'w.pt'}"]
    assert run_command([*words, *more], capsys)[0] == 0
    torch.testing.assert_close(teacher.load(out).state_dict()["stem.0.weight"], weights["stem.0.weight"] + 1,
                               atol=1e-4, rtol=0)  # fmt: skip


def test_members_that_inherit_have_no_other_teacher(
    tiny_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["search", f"--space={SPACE}", f"--data={tiny_npz}", "--data-backend=resident", "--workers=1"]
    words += [f"--run-dir={tmp_path / 'run'}", "--high.epochs=1", "--low.epochs=1", "--max-high=1", "--max-low=0"]
    code, text = run_command([*words, "--teacher=torchvision:resnet18"], capsys)
    assert code == 2
    assert "inherit the weights of its largest member" in text
    assert "leave --teacher out, or give a FILE made by: cli.py teacher --space" in text
    small = tmp_path / "small.safetensors"
    made = ["teacher", f"--space={SPACE}", "--arch=0", f"--data={tiny_npz}", "--data-backend=resident"]
    assert run_command([*made, f"--out={small}", "--teacher-epochs=1"], capsys)[0] == 0
    code, text = run_command([*words, f"--teacher={small}"], capsys)
    assert (code, "must be that, not tests/pretrained_space.py:SPACE#0" in text) == (2, True), text


def test_a_run_folder_holds_numbers_and_resumes_with_auto(tmp_path: Path) -> None:
    """60 images of three classes need no settings."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (60, 16, 16, 3), dtype=np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "few.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    given: dict[str, Any] = {
        "space": SPACE, "data": str(tmp_path / "few.npz"), "run_dir": tmp_path / "run", "max_low": 2, "max_high": 1,
        "high": Fidelity("high", epochs=0), "low": Fidelity("low", "1/2", 0), "teacher_epochs": 1,  # type: ignore[arg-type]
        "final_training": "never", "baselines": "never", "device": "cpu", "workers": 1,
    }  # fmt: skip
    run = mfkd.search(**given)
    stored = yaml.safe_load(RunFolder(run.path).config.read_text())["config"]
    assert (stored["batch_size"], stored["high"]["epochs"], stored["low"]["epochs"]) == (8, 32, 8)
    assert {trial.trial.fidelity.epochs for trial in run.trials} == {8, 32}
    assert mfkd.search(**given).winner == run.winner
    with pytest.raises(UsageError, match=r"high.epochs: 32 there, 2 here"):
        mfkd.search(**{**given, "high": Fidelity("high", epochs=2)})
