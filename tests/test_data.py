"""Data sets by name, splits, subsets, fingerprints, the cache, and the errors for bad arrays."""

import dataclasses
import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import arrays, glyphs
from engine.data.dataset import Dataset, fingerprint, load, steps_per_epoch, subset, train_valid_rows
from engine.trial import EnvironmentUnusable, UsageError

CLASS_SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)
FRACTIONS = st.fractions(min_value=Fraction(1, 200), max_value=1)


def labels_of(sizes: list[int]) -> np.ndarray:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(0).permutation(labels)


def some_arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    """A valid .npz content of 3 classes x 10 + 6 images of 8 x 8, with `changes`."""
    rng = np.random.default_rng(0)
    sound = {
        "x_train": rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8),
        "y_train": np.arange(30) % 3,
        "x_test": rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8),
        "y_test": np.arange(6, dtype=np.int32) % 3,
    }
    return {**sound, **changes}


def saved(folder: Path, **changes: np.ndarray) -> str:
    np.savez(folder / "data.npz", **some_arrays(**changes))
    return str(folder / "data.npz")


@settings(max_examples=100, deadline=None)
@given(CLASS_SIZES, FRACTIONS, FRACTIONS, st.integers(0, 2**32))
def test_subsets_are_nested_of_the_exact_size_and_hold_every_class(
    sizes: list[int], one: Fraction, other: Fraction, seed: int
) -> None:
    labels = labels_of(sizes)
    small, large = (subset(labels, f, seed) for f in sorted([one, other]))
    assert set(small) <= set(large)
    for fraction, chosen in zip(sorted([one, other]), (small, large), strict=True):
        assert len(set(chosen)) == len(chosen) == max(round(fraction * len(labels)), len(sizes))
        assert (np.diff(chosen) > 0).all()
        assert set(labels[chosen]) == set(labels)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 12), st.integers(1, 60), FRACTIONS, st.integers(0, 1000))
def test_balanced_labels_stay_balanced_to_within_one(classes: int, size: int, fraction: Fraction, seed: int) -> None:
    labels = labels_of([size] * classes)
    counts = np.bincount(labels[subset(labels, fraction, seed)], minlength=classes)
    assert counts.max() - counts.min() <= 1


def test_uneven_classes_keep_their_share() -> None:
    labels = labels_of([1000, 300, 50])
    counts = np.bincount(labels[subset(labels, Fraction(1, 9), 0)])
    np.testing.assert_allclose(counts, [1000 / 9, 300 / 9, 50 / 9], atol=1.5)


def test_a_subset_depends_on_its_seed() -> None:
    labels = labels_of([50] * 10)
    np.testing.assert_array_equal(subset(labels, Fraction(1, 3), 1), subset(labels, Fraction(1, 3), 1))
    assert not np.array_equal(subset(labels, Fraction(1, 3), 1), subset(labels, Fraction(1, 3), 2))


@pytest.mark.parametrize("fraction", [Fraction(0), Fraction(-1, 2), Fraction(3, 2)])
def test_a_fraction_outside_0_to_1_is_refused(fraction: Fraction) -> None:
    with pytest.raises(UsageError, match="over 0 and at most 1"):
        subset(np.zeros(5, np.int64), fraction, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=8), st.floats(0.01, 0.5), st.integers(0, 99))
def test_train_and_valid_share_no_image_and_both_hold_every_class(sizes: list[int], fraction: float, seed: int) -> None:
    labels = labels_of(sizes)
    train, valid = train_valid_rows(labels, fraction, seed, tuple(map(str, range(len(sizes)))))
    assert sorted([*train, *valid]) == list(range(len(labels)))
    assert set(labels[train]) == set(labels[valid]) == set(labels)


def test_npz_is_split_and_described(tmp_path: Path) -> None:
    data = load(saved(tmp_path, class_names=np.array(["a", "b", "c"])), seed=1, cache=tmp_path)
    assert (len(data.train), len(data.valid), len(data.test)) == (24, 6, 6)
    assert data.classes == ("a", "b", "c")
    assert (data.resolution, data.flip) == (8, True)
    given_ = some_arrays()
    pixels = given_["x_train"].reshape(-1, 3) / 255
    np.testing.assert_allclose([data.mean, data.std], [pixels.mean(0), pixels.std(0)], rtol=1e-5)
    assert data.train.images is not None
    assert data.valid.images is not None
    rows = {image.tobytes(): label for image, label in zip(given_["x_train"], given_["y_train"], strict=True)}
    for split in (data.train, data.valid):
        assert [rows.pop(image.tobytes()) for image in split.images] == split.labels.tolist()
        assert split.images.flags.c_contiguous
        assert split.labels.dtype == np.int64
    assert not rows
    np.testing.assert_array_equal(data.test.images, given_["x_test"])


def test_an_npz_can_forbid_mirroring(tmp_path: Path) -> None:
    assert not load(saved(tmp_path, flip=np.array(False)), cache=tmp_path).flip


BAD_NPZ: list[tuple[dict[str, np.ndarray], str]] = [
    ({"x_train": np.zeros((30, 8, 8, 3), np.float32)}, r"x_train is float32 .* must be uint8 \(N, H, H, 3\)"),
    ({"x_train": np.zeros((30, 3, 8, 8), np.uint8)}, r"x_train is uint8 \(30, 3, 8, 8\)"),
    ({"x_train": np.zeros((30, 8, 6, 3), np.uint8)}, r"x_train is uint8 \(30, 8, 6, 3\)"),
    ({"x_test": np.zeros((6, 9, 9, 3), np.uint8)}, "the image sizes differ"),
    ({"x_test": np.zeros((0, 8, 8, 3), np.uint8), "y_test": np.zeros(0, int)}, "at least one image"),
    ({"y_train": np.arange(29) % 3}, r"y_train is int64 \(29,\).* one for each of 30"),
    ({"y_test": np.zeros(6)}, "y_test is float64"),
    ({"y_train": 1 + np.arange(30) % 3}, "3 labels from 1 to 3; number the classes 0, 1, 2"),
    ({"y_train": np.arange(30) % 3 * 2}, "3 labels from 0 to 4"),
    ({"y_test": np.array([0, 1, 2, 7, 7, -1])}, "y_test has labels that y_train lacks: -1, 7"),
    ({"class_names": np.array(["a", "b"])}, "2 names for 3 classes"),
    ({"y_train": np.array([0] * 15 + [1] * 14 + [2])}, r"at least 2 training images.* 2 \(1\)"),
    ({"class_names": np.array(["a", "b", {}], dtype=object)}, "plain arrays"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_NPZ, ids=[message[:30] for _, message in BAD_NPZ])
def test_a_bad_npz_is_refused_with_the_reason(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(EnvironmentUnusable, match=message):
        load(saved(tmp_path, **changes), cache=tmp_path)


def test_a_file_that_is_not_a_valid_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "lacks.npz", x_train=np.zeros(3), other=np.zeros(3))
    with pytest.raises(EnvironmentUnusable, match="lacks y_train, x_test, y_test; it holds x_train, other"):
        load(str(tmp_path / "lacks.npz"), cache=tmp_path)
    (tmp_path / "text.npz").write_text("not a zip")
    with pytest.raises(EnvironmentUnusable, match=r"cannot be read as an .npz of plain arrays"):
        load(str(tmp_path / "text.npz"), cache=tmp_path)
    whole = Path(saved(tmp_path)).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EnvironmentUnusable, match=r"cannot be read as an .npz of plain arrays"):
        load(str(tmp_path / "cut.npz"), cache=tmp_path)
    with pytest.raises(EnvironmentUnusable, match="no such file"):
        load(str(tmp_path / "missing.npz"), cache=tmp_path)


@pytest.mark.parametrize("spec", ["cifar", "imagenet", "glyphs:", "glyphs:ten", "glyphs:100", "glyphs:-5"])
def test_an_unknown_data_set_is_refused(spec: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="glyphs:N"):
        load(spec, cache=tmp_path)


@pytest.mark.parametrize("fraction", [0.0, 0.6, -1.0])
def test_an_invalid_validation_fraction_is_refused(fraction: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"at most 0\.5"):
        load("glyphs:144", valid_fraction=fraction, cache=tmp_path)


def test_glyphs_are_made_once_and_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load("glyphs:180", seed=0, cache=tmp_path)
    assert (len(first.train), len(first.valid), len(first.test)) == (144, 36, 45)
    assert (len(first.classes), first.flip, first.resolution) == (36, False, 32)
    monkeypatch.setattr(glyphs, "render", lambda *_, **__: pytest.fail("rendered again"))
    again = load("glyphs:180", seed=0, cache=tmp_path)
    assert fingerprint(again) == fingerprint(first)
    assert isinstance(again.test.images, np.memmap)
    other_split = load("glyphs:180", seed=1, cache=tmp_path, resolution=16)
    np.testing.assert_array_equal(other_split.test.images, first.test.images)
    assert not np.array_equal(other_split.train.images, first.train.images)
    assert other_split.resolution == 16


def test_two_processes_may_make_the_same_glyphs_at_once(tmp_path: Path) -> None:
    code = (
        "import pathlib; from engine.data.dataset import fingerprint, load;"
        f"print(fingerprint(load('glyphs:1440', cache=pathlib.Path({str(tmp_path)!r}))))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    prints = {process.communicate(timeout=60)[0] for process in both}
    assert len(prints) == 1
    assert len(prints.pop()) == 17
    assert [path.name for path in tmp_path.iterdir()] == [
        f"glyphs-v{glyphs.VERSION}-1440"
    ]  # no temporary folder is left


def test_the_flip_setting_overrides_the_data(tmp_path: Path) -> None:
    there = saved(tmp_path)
    assert [load(there, flip=flip, cache=tmp_path).flip for flip in ("auto", "always", "never")] == [True, True, False]
    assert not load("glyphs:144", cache=tmp_path).flip
    assert load("glyphs:144", flip="always", cache=tmp_path).flip


def test_a_cache_that_cannot_be_used_says_what_to_do(tmp_path: Path) -> None:
    load("glyphs:144", cache=tmp_path)
    file = tmp_path / f"glyphs-v{glyphs.VERSION}-144" / "x_train.npy"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(EnvironmentUnusable, match=r"damaged .* delete it"):
        load("glyphs:144", cache=tmp_path)
    file.unlink()  # as automatic clean-up of scratch space does, which leaves the folder
    with pytest.raises(EnvironmentUnusable, match=r"damaged \(it has only .*\); delete it"):
        load("glyphs:144", cache=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentUnusable, match="XDG_CACHE_HOME"):
        load("glyphs:144", cache=tmp_path / "file" / "cache")


def cifar_archive(name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A small archive in CIFAR's binary layout at `path`; its training images (40, 32, 32, 3) and labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(50, dtype=np.uint8) % 10
    head = labels[:, None] if name == "cifar10" else np.stack([labels // 5, labels], 1)
    records = np.hstack([head, images.transpose(0, 3, 1, 2).reshape(50, -1)])
    names = "\n".join(f"class{i}" for i in range(10)).encode() + b"\n\n"
    if name == "cifar10":
        files = {"batches.meta.txt": names, "data_batch_2.bin": records[20:40], "data_batch_1.bin": records[:20]}
        files |= {"test_batch.bin": records[40:], "readme.html": b"<html>"}
    else:
        files = {"fine_label_names.txt": names, "coarse_label_names.txt": b"x\n", "train.bin": records[:40]}
        files |= {"test.bin": records[40:]}
    with tarfile.open(path, "w:gz") as tar:
        for file, content in files.items():
            raw = content if isinstance(content, bytes) else content.tobytes()
            info = tarfile.TarInfo(f"folder/{file}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return images[:40], labels[:40]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_once_and_decoded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[np.ndarray, np.ndarray]] = []

    def download(url: str, root: str, filename: str, md5: str) -> None:
        assert url.endswith(filename)
        assert md5 == arrays.CIFAR[name][1]
        made.append(cifar_archive(name, Path(root) / filename))

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    data = load(name, cache=tmp_path)
    load(name, cache=tmp_path)
    assert len(made) == 1
    images, labels = made[0]
    assert data.classes == tuple(f"class{i}" for i in range(10))
    assert data.train.images is not None
    where = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert [where[image.tobytes()] for image in data.train.images] == data.train.labels.tolist()
    assert len(data.test) == 10


def test_cifar_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    with pytest.raises(EnvironmentUnusable, match=r"no network.*copy that file \(MD5 c32a.*\) to .*cifar-10-binary"):
        load("cifar10", cache=tmp_path)
    cifar_archive("cifar10", tmp_path / "cifar-10-binary.tar.gz")  # its digest differs from the real one
    with pytest.raises(EnvironmentUnusable, match="MD5"):
        load("cifar10", cache=tmp_path)


def changed(data: Dataset, change: Callable[[np.ndarray, np.ndarray], None]) -> Dataset:
    assert data.train.images is not None
    images, labels = data.train.images.copy(), data.train.labels.copy()
    change(images, labels)
    return dataclasses.replace(data, train=dataclasses.replace(data.train, images=images, labels=labels))


def test_the_fingerprint_depends_on_content_and_split_only(tmp_path: Path) -> None:
    data = load(saved(tmp_path), cache=tmp_path)
    (tmp_path / "moved").mkdir()
    assert fingerprint(data) == fingerprint(load(saved(tmp_path / "moved"), cache=tmp_path))
    different = [
        load(saved(tmp_path), seed=1, cache=tmp_path),
        load(saved(tmp_path, flip=np.array(False)), cache=tmp_path),
        load(saved(tmp_path, class_names=np.array(["x", "y", "z"])), cache=tmp_path),
        changed(data, lambda images, labels: np.add(images, 1, out=images)),
        changed(data, lambda images, labels: np.copyto(labels[3:4], (labels[3] + 1) % 3)),
    ]
    assert len({fingerprint(each) for each in [data, *different]}) == 6


def test_steps_per_epoch() -> None:
    assert [steps_per_epoch(n, 8) for n in (8, 15, 16)] == [1, 1, 2]
    with pytest.raises(UsageError, match=r"7 training images are fewer than a batch of 8; lower the batch size to 7"):
        steps_per_epoch(7, 8)
    with pytest.raises(UsageError, match="at least 1"):
        steps_per_epoch(7, 0)


def test_importing_data_loads_neither_torch_nor_pillow_nor_dali() -> None:
    heavy = "('torch', 'PIL', 'nvidia', 'torchvision')"
    code = f"import sys, engine.data.dataset; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
