"""Files that come with the package: configurations and examples."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# In a checkout these folders lie beside the package; a wheel has them inside (pyproject.toml).
HOMES = (PACKAGE.parent, PACKAGE)
FOLDERS = ("configs", "examples")


def shipped(path: str | Path) -> Path:
    """The path itself or, where there is no such file, the file of that name that comes with the package.

    So configs/demo.yaml and examples/my_space.py are found from any folder, also without a checkout.
    """
    wanted = Path(path)
    if wanted.exists() or wanted.parts[:1] not in {(name,) for name in FOLDERS}:
        return wanted
    return next((home / wanted for home in HOMES if (home / wanted).is_file()), wanted)
