"""Image folders: listing, checks and their record, and errors that name every bad file."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data import folder
from engine.data.dataset import fingerprint, load
from engine.trial import EnvironmentUnusable


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def image_folder(root: Path, classes: int = 3, train: int = 5, test: int = 2, test_name: str = "test") -> Path:
    for split, count in (("train", train), (test_name, test)):
        for c in range(classes):
            for i in range(count):
                ending = (".jpg", ".png", ".JPEG")[i % 3]
                picture(root / split / f"class{c}" / f"{i}{ending}", seed=100 * c + i)
    return root


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_a_folder_is_listed_split_and_described(tmp_path: Path, test_name: str) -> None:
    data = load(str(image_folder(tmp_path / "set", test_name=test_name)), cache=tmp_path)
    assert (len(data.train), len(data.valid), len(data.test)) == (12, 3, 6)
    assert data.classes == ("class0", "class1", "class2")
    assert (data.resolution, data.flip) == (224, True)
    for split in (data.train, data.valid, data.test):
        assert split.images is None
        assert split.files is not None
        assert [Path(file).parent.name for file in split.files] == [data.classes[c] for c in split.labels]
    assert len({*data.train.files, *data.valid.files, *data.test.files}) == 21  # type: ignore[misc]
    assert load(str(tmp_path / "set"), cache=tmp_path, resolution=64).resolution == 64


def test_one_of_five_images_per_class_is_for_validation(tmp_path: Path) -> None:
    data = load(str(image_folder(tmp_path / "set", classes=20, test=1)), cache=tmp_path)
    np.testing.assert_array_equal(np.bincount(data.train.labels), [4] * 20)
    np.testing.assert_array_equal(np.bincount(data.valid.labels), [1] * 20)


def test_hidden_and_other_files_are_ignored(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    before = fingerprint(load(str(root), cache=tmp_path))
    for name in (
        "train/class0/notes.txt",
        "train/class0/.hidden.jpg",
        "train/readme.md",
        "train/.cache/x",
        "labels.csv",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("not an image")
    assert fingerprint(load(str(root), cache=tmp_path)) == before


def test_every_bad_file_is_named_in_one_error(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    cut = picture(root / "train/class0/cut.jpg", size=(200, 200))
    cut.write_bytes(cut.read_bytes()[:3000])
    (root / "train/class1/text.jpg").write_text("no image at all")
    (root / "test/class2/empty.png").touch()
    picture(root / "train/class2/other.gif").rename(root / "train/class2/gif.png")
    with pytest.raises(EnvironmentUnusable) as caught:
        load(str(root), cache=tmp_path)
    message = str(caught.value)
    assert "4 of 25 images cannot be read; replace or remove them" in message
    assert f"{cut}: " in message
    assert "truncated" in message
    assert f"{root}/train/class1/text.jpg: is not a JPEG or PNG" in message
    assert f"{root}/test/class2/empty.png: is empty" in message
    assert f"{root}/train/class2/gif.png: is not a JPEG or PNG" in message
    for name in ("train/class0/cut.jpg", "train/class1/text.jpg", "test/class2/empty.png", "train/class2/gif.png"):
        (root / name).unlink()
    assert len(load(str(root), cache=tmp_path).test) == 6


def test_a_very_long_list_of_bad_files_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path / "set")
    monkeypatch.setattr(folder, "_NAMED", 2)
    for i in range(5):
        (root / f"train/class0/bad{i}.jpg").touch()
    with pytest.raises(EnvironmentUnusable, match=r"5 of 26 images(.*\n)*.*bad0.*\n.*bad1.*\n.*and 3 more"):
        load(str(root), cache=tmp_path)


def test_checked_files_are_decoded_again_only_if_they_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path / "set")
    decoded: list[int] = []
    check = folder.unreadable
    monkeypatch.setattr(folder, "unreadable", lambda files: decoded.append(len(files)) or check(files))
    load(str(root), cache=tmp_path)
    load(str(root), cache=tmp_path, seed=5)
    assert decoded == [21]
    changed = root / "train/class0/0.jpg"
    os.utime(changed, ns=(0, 0))
    load(str(root), cache=tmp_path)
    assert decoded == [21, 21]
    changed.write_text("no image")
    for _ in range(2):  # a check that failed is not remembered
        with pytest.raises(EnvironmentUnusable, match="1 of 21"):
            load(str(root), cache=tmp_path)


def test_class_folders_that_differ_or_are_empty(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    (root / "train/class9").mkdir()
    (root / "train/class9/notes.txt").touch()
    with pytest.raises(EnvironmentUnusable, match=r"no JPEG or PNG file in class9.*remove the empty folders"):
        load(str(root), cache=tmp_path)
    picture(root / "train/class9/a.jpg")
    (root / "test/class2").rename(root / "test/classX")
    with pytest.raises(EnvironmentUnusable, match="class2 only in train, class9 only in train, classX only in test"):
        load(str(root), cache=tmp_path)


def test_a_class_with_one_image_cannot_be_split(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    picture(root / "train/lonely/a.jpg")
    picture(root / "test/lonely/a.jpg")
    with pytest.raises(EnvironmentUnusable, match=r"at least 2 training images.*lonely \(1\)"):
        load(str(root), cache=tmp_path)


def test_a_fifth_of_plain_class_folders_is_for_testing_and_stays_so(tmp_path: Path) -> None:
    for c in range(3):
        for i in range(20):
            picture(tmp_path / f"flat/class{c}/{i}.jpg", seed=100 * c + i)
    data = load(str(tmp_path / "flat"), cache=tmp_path)
    np.testing.assert_array_equal(np.bincount(data.test.labels), [4, 4, 4])
    splits = [{Path(file) for file in split.files or ()} for split in (data.train, data.valid, data.test)]
    assert len(set.union(*splits)) == 60
    assert not splits[2] & (splits[0] | splits[1])
    (tmp_path / "flat").rename(tmp_path / "moved")
    picture(tmp_path / "moved/class0/20.jpg")
    again = load(str(tmp_path / "moved"), cache=tmp_path, seed=1)
    names = [{"/".join(Path(file).parts[-2:]) for file in d.test.files or ()} for d in (data, again)]
    assert len(names[0] ^ names[1]) <= 2


def test_a_class_of_two_images_cannot_be_split_in_three(tmp_path: Path) -> None:
    for name in ("0.jpg", "1.jpg"):
        picture(tmp_path / "flat/class0" / name)
    with pytest.raises(EnvironmentUnusable, match=r"at least 3 images.*class0 \(2\)"):
        load(str(tmp_path / "flat"), cache=tmp_path)


def test_a_folder_with_another_layout_is_refused_with_instructions(tmp_path: Path) -> None:
    picture(tmp_path / "loose/0.jpg")
    with pytest.raises(EnvironmentUnusable, match=r"no class folder.*arrange the images as train/<class>/"):
        load(str(tmp_path / "loose"), cache=tmp_path)
    picture(tmp_path / "untested/test/class0/0.jpg")
    with pytest.raises(EnvironmentUnusable, match=r"no folder train/.*arrange the images"):
        load(str(tmp_path / "untested"), cache=tmp_path)
    picture(tmp_path / "half/train/class0/0.jpg")
    with pytest.raises(EnvironmentUnusable, match=r"no folder test or val/.*arrange the images"):
        load(str(tmp_path / "half"), cache=tmp_path)
    (tmp_path / "half/test").mkdir()
    with pytest.raises(EnvironmentUnusable, match="no class folder"):
        load(str(tmp_path / "half"), cache=tmp_path)


def test_the_fingerprint_of_a_folder_moves_with_it(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    before = fingerprint(load(str(root), cache=tmp_path))
    moved = root.rename(tmp_path / "moved")
    assert fingerprint(load(str(moved), cache=tmp_path)) == before
    picture(moved / "train/class0/0.jpg", size=(50, 50))
    assert fingerprint(load(str(moved), cache=tmp_path)) != before
