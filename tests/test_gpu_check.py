"""What `make gpu-check` reports when no test ran."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import gpu_check


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["empty.py"], "no tests ran"), (["empty.py", "--of-a-plugin"], "unrecognized"), (["broken.py"], "1 error")],
    ids=["no tests", "a plugin that is missing", "an import that fails"],
)
def test_a_session_without_tests_does_not_look_like_success(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "broken.py").write_text("import no_such_package")
    found = gpu_check.run_pytest([str(tmp_path / arguments[0]), *arguments[1:]], 100)
    assert found["exit_code"] > 1
    assert said in found["failures"][-1]
