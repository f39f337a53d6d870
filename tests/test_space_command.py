"""`space`: what it shows of a space, and which mistakes it finds in a user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cli
from engine.space import candidates
from engine.spaces.load import load_space
from engine.tasks import SpaceCheckTask, task_to_json
from engine.training.spacecheck import run_check
from engine.trial import UsageError

GOOD = """
import torch
from torch import nn

from engine.networks import Staged, conv_bn, pooled_classifier
from engine.space import Choice, SearchSpace
from engine.spaces.arithmetic import conv_cost, linear_cost
import numpy as np

CHANNELS = (8, 12)


def build(choices, classes, width):
    c = int(CHANNELS[choices[0]] * width)
    first, second = (conv_bn(a, b, 3, 2) for a, b in ((3, c), (c, 2 * c)))
    return Staged(nn.Identity(), [first, second], pooled_classifier(2 * c, classes))


def cost(choices, classes, width, resolution):
    rows = []
    for row in choices:
        c, r = int(CHANNELS[row[0]] * width), resolution // 2
        rows.append(conv_cost(3, c, 3, r) + conv_cost(c, 2 * c, 3, r // 2) + linear_cost(2 * c, classes))
    macs, params = np.array(rows).T[:2]
    return macs, params


CHOICES = (Choice("channels", CHANNELS, ordinal=True), Choice("activation", ("relu", "none")))
SPACE = SearchSpace("own", CHOICES, build, cost, canonical=lambda choices: (choices[0], 0))
"""


def check(path: Path, text: str, teacher: str = "auto") -> dict[str, object]:
    (path / "own.py").write_text(text)
    return run_check(task_to_json(SpaceCheckTask(f"{path / 'own.py'}:SPACE", 3, 16, teacher, seed=0)))


def test_a_good_space_passes(tmp_path: Path) -> None:
    found = check(tmp_path, GOOD)
    assert found["cost"] == "closed form"
    assert found["features"] == [[8, 8, 8], [16, 4, 4]]
    assert found["pairs"] == [[[8, 8, 8], [12, 8, 8]], [[16, 4, 4], [24, 4, 4]]]
    assert found["cost_of"] == "space"
    everything = candidates(load_space(f"{tmp_path / 'own.py'}:SPACE"), 3, 1.0, 16)
    assert found["macs"] == [everything.macs.min(), everything.macs.max()]
    assert check(tmp_path, GOOD, "torchvision:resnet18")["pairs"] == [[[8, 8, 8], [64, 8, 8]], [[16, 4, 4], [64, 4, 4]]]


RETURNED = "return Staged(nn.Identity(), [first, second], pooled_classifier(2 * c, classes))"
MISTAKES = {
    "build raises": (RETURNED, "return 1 / 0", r"build\(\(0, 0\), 3, 1\) raises ZeroDivisionError"),
    "no module": (RETURNED, "return [first]", "build returns a list; it must be a torch.nn.Module"),
    "no features": (
        RETURNED,
        "return nn.Sequential(first, second, *pooled_classifier(2 * c, classes))",
        r"must return \(logits, \[features\]\), as engine.networks.Staged does",
    ),
    "empty features": ("[first, second]", "[]", "raises|features must be one or more tensors"),
    "wrong classes": ("2 * c, classes))", "2 * c, 7))", r"logits are \(4, 7\); they must be \(4, 3\)"),
    "channels do not fit": ("(c, 2 * c))", "(c + 1, 2 * c))", r"its forward on images \(4, 3, 16, 16\) raises"),
    "weights from numpy": (
        "    return Staged",
        "    first[0].weight.data += float(np.random.rand())\n    return Staged",
        "two builds from one seed have different weights",
    ),
    "wrong cost": ("conv_cost(3, c, 3, r)", "conv_cost(3, c, 5, r)", "it gives .* torch counts .*omit `cost`"),
    "wrong cost of another width": ("(CHANNELS[row[0]] * width)", "(CHANNELS[row[0]])", "at width 0.5, 16 pixels"),
    "same option twice": ('("relu", "none")', '("relu", "relu")', "choice 'activation' has the option 'relu' twice"),
    "canonical moves on": (
        "(choices[0], 0)",
        "(choices[0], 1 - choices[1])",
        r"canonical\(0-0\) is 0-1, whose canonical form is another one",
    ),
    "one architecture": ('SearchSpace("own", CHOICES', 'SearchSpace("own", ()', "has 1 architecture; give a choice"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_fix(mistake: str, tmp_path: Path) -> None:
    before, after, message = MISTAKES[mistake]
    assert before in GOOD
    with pytest.raises(UsageError, match=message):
        check(tmp_path, GOOD.replace(before, after))


def test_features_that_match_none_of_the_teacher_are_named(tmp_path: Path) -> None:
    padded = GOOD.replace("[first, second]", "[nn.Sequential(first, second, nn.ZeroPad2d(1))]")
    with pytest.raises(UsageError, match="no feature has the size of one of the teacher .*: 6x6 here, 8x8, 4x4, 2x2"):
        check(tmp_path, padded, "torchvision:resnet18")


def test_the_command_checks_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    """As in docs/spaces.md."""
    assert cli.main(["space", "check", "examples/my_space.py:SPACE", "--resolution", "8"]) == 0
    out = capsys.readouterr().out
    assert "13,824 architectures, ready to search" in out
    assert "counted on built networks; the 6 checked have 0.18 to" in out
    assert cli.main(["space", "check", "examples/none.py:SPACE"]) == 2
    assert "no file examples/none.py" in capsys.readouterr().err


def test_spaces_are_listed_shown_and_sampled(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["space", "list"]) == 0
    assert "2,097,152 architectures; options width=1.0, stem_stride=1" in capsys.readouterr().out
    assert cli.main(["space", "show", "nasbench201", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["candidates"] == 6466
    assert facts["choices"][0]["options"][3] == "nor_conv_3x3"
    assert cli.main(["space", "sample", "shufflenetv2", "--count", "3", "--json"]) == 0
    drawn = json.loads(capsys.readouterr().out)["architectures"]
    assert len(drawn) == 3
    assert drawn[0]["architecture"] == "2-2-1-1-0-0"
    assert drawn[0]["options"][0] == 8
    assert cli.main(["space", "check"]) == 2
    assert "name a space" in capsys.readouterr().err
