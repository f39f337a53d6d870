"""The source of model.py: everything that a function needs, and nothing of the engine."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from engine.export.standalone import Imported, NotSelfContained, call_of, closure_of
from engine.spaces.load import load_space


def module(path: Path, text: str) -> ModuleType:
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


OWN = '''
from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy.typing as npt

# How wide.
WIDTH, UNUSED_TWIN = 8, 9
UNUSED = 3


class Base:
    """Before its subclass in the file, and so in the output."""


class Child(Base):
    width = WIDTH


def build(choices: npt.NDArray, classes: int, width: float):
    from torch import nn

    from engine.networks import conv_bn as block

    return nn.Sequential(block(3, Child.width, 3), nn.Flatten(), nn.Linear(math.prod((8, 4, 4)), classes))


def unused():
    import engine
'''


def test_the_source_contains_what_is_used_and_runs_without_the_engine(tmp_path: Path) -> None:
    closure = closure_of(module(tmp_path / "own.py", OWN).build)
    closure.add_imports({Imported("torch", "nn", "nn")}, set())
    text = "\n".join(["from __future__ import annotations", *closure.import_lines(), closure.text()])
    assert "# How wide." in text
    assert "UNUSED =" not in text
    assert "def unused" not in text
    assert "engine" not in text
    assert "numpy" not in text
    (tmp_path / "alone.py").write_text(text + "\nassert build((), 5, 1.0)[2].out_features == 5")
    subprocess.run([sys.executable, "-I", str(tmp_path / "alone.py")], check=True, cwd=tmp_path)


@pytest.mark.parametrize("spec", ["nasbench201", "mobilenetv2", "shufflenetv2", "examples/my_space.py:SPACE"])
def test_every_built_in_space_needs_only_torch(spec: str) -> None:
    build, _ = call_of(load_space(spec).build)
    for line in closure_of(build).import_lines():
        assert line.split()[1].split(".")[0] in {"torch", "collections"}, line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import numpy as np\ndef build(c, n, w):\n    return np.ones(3)", "own.py imports numpy"),
        ("def build(c, n, w):\n    from PIL import Image\n    return Image", "own.py imports PIL"),
        ("def build(c, n, w):\n    from . import blocks\n    return blocks", "from its own package"),
        ("def build(c, n, w):\n    import engine.networks\n    return engine.networks", "own.py imports engine.net"),
        (
            "class Staged: pass\ndef build(c, n, w):\n"
            "    from engine.networks.nasbench201 import network\n    return Staged, network",
            "define `Staged`; rename one",
        ),
    ],
)
def test_code_that_needs_more_is_refused_with_the_reason(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(NotSelfContained, match=message):
        closure_of(module(tmp_path / "own.py", text).build)


def test_names_of_the_rest_of_model_py_must_be_free(tmp_path: Path) -> None:
    closure = closure_of(module(tmp_path / "own.py", "MEAN = 1\ndef build(c, n, w):\n    return MEAN").build)
    with pytest.raises(NotSelfContained, match="`MEAN` would mean two things"):
        closure.add_imports(set(), {"MEAN"})


def test_a_build_must_be_a_function_with_plain_arguments() -> None:
    assert call_of(load_space("nasbench201:channels=4,cells=1").build)[1] == "4, 1, "
    for build, message in (
        (lambda c, n, w: None, "not a function at the top level"),
        (partial(module, object()), "cannot be written as text"),
        (partial(module, text="x"), "by name"),
    ):
        with pytest.raises(NotSelfContained, match=message):
            call_of(build)
