"""Packs what a GPU machine without network access lacks into a folder small enough to copy there.

    python -m bench.gpu_bundle build/gpu-bundle [--images shared/data/cifar10_small.npz] [--python 3.12]

`make gpu-bundle` runs this, and `make gpu-check DALI=build/gpu-bundle` uses the result. `images.npz` holds CIFAR-10
images from an archive in the shared folder. `dali.tar.xz` holds DALI's wheel and its dependencies, for one version of
Python. The machine code of all GPU architectures but one is zeroed, so that the archive shrinks to a third. Needs pip
and a package registry.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Packages that the DALI part of gpu-check imports and that an image with torch lacks.
PACKAGES = ("nvidia-dali-cuda130>=2.4", "astunparse", "gast", "six", "optree")
PLATFORM = "manylinux_2_28_x86_64"
KEPT_ARCHITECTURE = 90  # sm_90: H100, H200
MAGIC, CUBIN = 0xBA55ED50, 2
IMAGES, TEST_IMAGES = 2000, 500
LIMIT = 64 * 2**20  # bytes to copy, including the project's own files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=Path, help="a CIFAR-10 archive with x_train, y_train, x_test, y_test")
    parser.add_argument("--python", default="3.12", help="Python version of the machine with the GPU")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.images is not None:
        keep_images(given.images, given.folder / "images.npz")
    with tempfile.TemporaryDirectory() as scratch:
        fetch(Path(scratch), given.python)
        archive(Path(scratch), given.folder / "dali.tar.xz")
    for file in sorted(given.folder.iterdir()):
        print(f"{file.stat().st_size / 2**20:6.1f} MiB {file}")
    total = sum(file.stat().st_size for file in given.folder.iterdir()) + tracked_bytes()
    print(f"{total / 2**20:6.1f} MiB with the project's own files, of {LIMIT / 2**20:.0f}")
    return 0 if total <= LIMIT else 1


def keep_images(source: Path, target: Path) -> None:
    """Keeps the first images of each split, which are enough to compare scores."""
    with np.load(source, allow_pickle=False) as arrays:
        few = {"train": IMAGES, "test": TEST_IMAGES}
        kept = {f"{kind}_{split}": arrays[f"{kind}_{split}"][:count] for split, count in few.items() for kind in "xy"}
    np.savez_compressed(target, **kept)


def fetch(folder: Path, python: str) -> None:
    """Downloads the packages' wheels for that Python version, unpacks them and slims them."""
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", python, "--platform", PLATFORM, "--dest", str(wheels), *PACKAGES]
    subprocess.run(command, check=True)
    for wheel in wheels.iterdir():
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder / "packages")
        wheel.unlink()
    wheels.rmdir()
    tag = f".cpython-{python.replace('.', '')}-"
    for file in list((folder / "packages").rglob("*")):
        other = re.search(r"\.cpython-\d+t?-", file.name)
        if (other and other[0] != tag) or (file.is_file() and "include" in file.parts):
            file.unlink()
        elif ".so" in file.name:
            slim(file)


def slim(library: Path) -> None:
    """Zeroes a shared library's GPU code in place, except that for KEPT_ARCHITECTURE."""
    data = bytearray(library.read_bytes())
    for start, size, kind, architecture in code_in(data):
        if (kind, architecture) != (CUBIN, KEPT_ARCHITECTURE):
            data[start : start + size] = bytes(size)
    library.write_bytes(data)


def code_in(data: bytes | bytearray) -> Iterator[tuple[int, int, int, int]]:
    """(offset, bytes, kind, architecture) of each piece of GPU code in an ELF file.

    A fat binary is a header (magic, version, bytes of the header, bytes of the rest) and then entries. Each entry has
    its own header: the kind at 0, the header's bytes at 4, the code's bytes at 8, the architecture at 28.
    """
    magic, place = struct.pack("<I", MAGIC), -1
    while (place := data.find(magic, place + 1)) >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, place)
        entry, end = place + header, place + header + size
        if header != 16 or end > len(data):
            continue  # the same four bytes by coincidence
        while entry + 64 <= end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, entry)
            if not 32 <= header <= 4096:
                break
            yield entry + header, size, kind, struct.unpack_from("<I", data, entry + 28)[0]
            entry += header + size


def archive(folder: Path, target: Path) -> None:
    """Compresses the packages with xz and its filter for x86 code, which saves a tenth."""
    plain = folder / "packages.tar"
    with tarfile.open(plain, "w") as tar:
        tar.add(folder / "packages", ".")
    with open(target, "wb") as out:
        subprocess.run(["xz", "--x86", "--lzma2=preset=6,dict=64MiB", "--stdout", str(plain)], stdout=out, check=True)


def tracked_bytes() -> int:
    """Size of the files under version control, which are copied too."""
    root = Path(__file__).resolve().parent.parent
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    return sum((root / name).stat().st_size for name in listed.split("\0") if (root / name).is_file())


if __name__ == "__main__":
    sys.exit(main())
