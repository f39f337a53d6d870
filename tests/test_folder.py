"""Image folders: listing, checks and their record, and errors that name every bad file."""

import errno
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data import folder, image_files
from engine.data.dataset import Dataset, fingerprint, load
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


def passed_over(data: Dataset) -> dict[str, str]:
    """The reason by the name of each file that the last note names."""
    (note,) = (note for note in data.notes if note.startswith("passed over"))
    count, _, names = note.removeprefix("passed over ").partition(": ")
    found = dict(re.fullmatch(r"(.*) \((.*)\)", entry, re.DOTALL).groups() for entry in re.split(r"(?<=\)), ", names))  # type: ignore[union-attr]
    assert len(found) == int(count)
    return found


def test_what_is_no_image_is_named_and_changes_nothing(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", train=10)
    before = load(str(root), cache=tmp_path)
    assert before.notes == ()
    reasons = {
        "labels.csv": "not an image",
        "cover.jpg": "not in a class folder",
        "train/readme.md": "not an image",
        "train/cover.jpg": "not in a class folder",
        "train/class0/notes.txt": "not an image",
        "train/class0/no ending": "not an image",
        "train/class0/Thumbs.db": "not an image",
        "train/class0/.DS_Store": "hidden",
        "train/class0/.hidden.jpg": "hidden",
        "train/class0/drawing.psd": "not read; convert it to JPEG",
        "train/class1/IMG_0001.HEIC": "not read; convert it to JPEG",
        "train/class1/film.mp4": "not an image",
        "train/class1/a, b.xml": "not an image",
        "train/class1/new\\nline.txt": "not an image",
        "train/class1/\\udcff.txt": "not an image",
        "train/.cache/": "hidden",
        "__MACOSX/": "not a class",
        "train/class2/@eaDir/": "not a class",
        "train/class2/round/": "a link to a folder above it",
        "train/class2/pipe.jpg": "not a regular file",
        "train/class2/gone": "dangling link",
        "spare/": "1 images, in no split",
        # With the ending of an image, but it does not decode:
        "train/class0/empty.jpg": "empty",
        "train/class0/gone.jpg": "dangling link",
        "train/class2/404.png": "not an image, despite its name",
    }
    for name in reasons:
        path = root / os.fsdecode(name.replace("\\n", "\n").encode().replace(b"\\udcff", b"\xff"))
        if name.endswith("/"):
            picture(path / "small.jpg") if "round" not in name else path.symlink_to(root / "train/class2")
        elif name.endswith("cover.jpg"):
            picture(path)
        elif "gone" in name:
            path.symlink_to("nothing.jpg")
        elif "pipe" in name:
            os.mkfifo(path)
        else:
            path.write_text("" if "empty" in name else "not an image")
    data = load(str(root), cache=tmp_path)
    assert passed_over(data) == reasons
    assert fingerprint(data) == fingerprint(before)
    (note,) = data.notes
    assert note.startswith("passed over 25: train/class0/empty.jpg (empty), train/class0/gone.jpg (dangling link), ")
    assert "\n" not in note


def test_of_very_many_files_the_line_names_those_that_may_have_been_meant_as_images(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    for i in range(1000):
        (root / f"train/class0/{i:04}.xml").touch()
    (root / "train/class1/photo.heic").touch()
    (note,) = load(str(root), cache=tmp_path).notes
    assert note.startswith("passed over 1,001: train/class1/photo.heic (not read; convert it to JPEG), ")
    assert note.endswith(", and 961 more")


def test_many_bad_files_are_an_error_that_names_them(tmp_path: Path) -> None:
    """The images may not have been copied whole; a training on the others would not be what was asked for."""
    root = image_folder(tmp_path / "set")
    cut = picture(root / "train/class0/cut.jpg", size=(200, 200))
    cut.write_bytes(cut.read_bytes()[:3000])
    (root / "train/class1/text.jpg").write_text("no image at all")
    (root / "test/class2/empty.png").touch()
    with pytest.raises(EnvironmentUnusable) as caught:
        load(str(root), cache=tmp_path)
    message = str(caught.value)
    assert "3 of 24 images cannot be read, too many to pass over; replace or remove them" in message
    assert f"{cut}: " in message
    assert "truncated" in message
    assert f"{root}/train/class1/text.jpg: not an image, despite its name" in message
    assert f"{root}/test/class2/empty.png: empty" in message
    cut.unlink()
    assert passed_over(load(str(root), cache=tmp_path)) == {
        "test/class2/empty.png": "empty",
        "train/class1/text.jpg": "not an image, despite its name",
    }


def test_a_class_of_which_no_image_can_be_read_is_an_error(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", train=20)
    for split, count in (("train", 2), ("test", 1)):
        for i in range(count):
            (root / split / "lost").mkdir(exist_ok=True)
            (root / split / f"lost/{i}.jpg").symlink_to(f"gone/{i}.jpg")
    with pytest.raises(EnvironmentUnusable, match=r"no image of the class lost can be read.*\n.*lost/0.jpg: dangling"):
        load(str(root), cache=tmp_path)


def test_a_very_long_list_of_bad_files_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path / "set")
    monkeypatch.setattr(folder, "_NAMED", 2)
    for i in range(5):
        (root / f"train/class0/bad{i}.jpg").touch()
    with pytest.raises(EnvironmentUnusable, match=r"5 of 26 images(.*\n)*.*bad0.*\n.*bad1.*\n.*and 3 more"):
        load(str(root), cache=tmp_path)


def test_checked_files_are_decoded_again_only_if_they_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path / "set")
    looked: list[str] = []
    decoded = image_files._decoded
    monkeypatch.setattr(image_files, "_decoded", lambda file: looked.append(file) or decoded(file))
    load(str(root), cache=tmp_path)
    load(str(root), cache=tmp_path, seed=5)
    assert len(looked) == 21
    changed = root / "train/class0/0.jpg"
    os.utime(changed, ns=(0, 0))
    load(str(root), cache=tmp_path)
    assert len(looked) == 42
    changed.write_text("no image")
    looked.clear()
    counts = [len(looked) for _ in range(2) if passed_over(load(str(root), cache=tmp_path))]
    assert counts == [21, 22]  # it may have been a matter of the disk


def test_class_folders_that_differ_or_are_empty(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    (root / "train/class9").mkdir()
    (root / "train/class9/notes.txt").touch()
    with pytest.raises(EnvironmentUnusable, match=r"no image in class9 \(passed over 1: train/class9/notes.txt \("):
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
    (tmp_path / "half/test").mkdir()
    with pytest.raises(EnvironmentUnusable, match=r"train/ has class folders, but no class folder .* is in test/"):
        load(str(tmp_path / "half"), cache=tmp_path)


def test_the_fingerprint_of_a_folder_moves_with_it(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    before = fingerprint(load(str(root), cache=tmp_path))
    moved = root.rename(tmp_path / "moved")
    assert fingerprint(load(str(moved), cache=tmp_path)) == before
    picture(moved / "train/class0/0.jpg", size=(50, 50))
    assert fingerprint(load(str(moved), cache=tmp_path)) != before


def flat(root: Path, *classes: str, count: int = 5) -> Path:
    """`count` pictures in each of some folders."""
    for c, name in enumerate(classes):
        for i in range(count):
            picture(root / name / f"{i}.jpg", seed=1000 * c + i)
    return root


def sizes(data: Dataset) -> tuple[int, int, int]:
    return len(data.train), len(data.valid), len(data.test)


def names(data: Dataset, split: str) -> set[str]:
    files = getattr(data, split).files
    return {os.path.relpath(file, data.name) for file in files}


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_a_validation_part_beside_train_and_test_is_used(tmp_path: Path, name: str) -> None:
    root = image_folder(tmp_path / "set")
    flat(root / name, "class0", "class1", "class2", count=3)
    data = load(str(root), cache=tmp_path, valid_fraction=0.5)
    assert sizes(data) == (15, 9, 6)
    assert names(data, "valid") == {f"{name}/class{c}/{i}.jpg" for c in range(3) for i in range(3)}
    assert data.notes == (f"{name}/ is the validation part, so --valid-fraction has no effect",)
    assert fingerprint(load(str(root), cache=tmp_path, seed=7)) == fingerprint(data)


def test_a_validation_part_without_a_test_part_serves_as_one(tmp_path: Path) -> None:
    data = load(str(image_folder(tmp_path / "set", test_name="val")), cache=tmp_path)
    assert sizes(data) == (12, 3, 6)
    assert data.notes == ("val/ is the test part",)


def test_other_names_of_the_splits(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", test_name="Testing")
    (root / "train").rename(root / "Training")
    assert sizes(load(str(root), cache=tmp_path)) == (12, 3, 6)
    flat(root / "test", "class0", "class1", "class2")
    with pytest.raises(EnvironmentUnusable, match=r"Testing/ and test/ are the same split; merge them or remove one"):
        load(str(root), cache=tmp_path)


@pytest.mark.parametrize("names", [("train", "car"), ("train", "test", "car"), ("val", "car", "bus")])
def test_a_folder_of_images_is_a_class_whatever_its_name(tmp_path: Path, names: tuple[str, ...]) -> None:
    data = load(str(flat(tmp_path / "set", *names)), cache=tmp_path)
    assert data.classes == tuple(sorted(names))
    assert sizes(data) == (3 * len(names), len(names), len(names))
    assert data.notes == ("a fifth of each class is the test part",)


def test_splits_without_class_folders_are_no_classes(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnusable, match=r"test/ and train/ hold images and no class folders; arrange"):
        load(str(flat(tmp_path / "set", "train", "test")), cache=tmp_path)


def test_a_class_called_train_with_folders_inside_is_not_guessed_at(tmp_path: Path) -> None:
    root = flat(tmp_path / "set", "train/steam", "train/diesel", "car")
    with pytest.raises(EnvironmentUnusable, match=r"train/ has folders inside.* but car/ is beside it.*If train/ is a"):
        load(str(root), cache=tmp_path)


@pytest.mark.parametrize("above", ["photos", "photos/photos", "train"])
def test_classes_in_a_single_folder_are_found(tmp_path: Path, above: str) -> None:
    root = flat(tmp_path / "set" / above, "cat", "dog")
    (tmp_path / "set/notes.txt").touch()
    data = load(str(tmp_path / "set"), cache=tmp_path)
    assert (data.classes, sizes(data)) == (("cat", "dog"), (6, 2, 2))
    assert data.notes[:2] == (f"read from {above}/", "a fifth of each class is the test part")
    assert passed_over(data) == {"notes.txt": "not an image"}
    assert fingerprint(load(str(root), cache=tmp_path)) == fingerprint(data)


def test_splits_in_a_single_folder_are_found(tmp_path: Path) -> None:
    image_folder(tmp_path / "set/photos")
    assert sizes(load(str(tmp_path / "set"), cache=tmp_path)) == (12, 3, 6)


def test_images_in_folders_of_a_class_belong_to_it(tmp_path: Path) -> None:
    root = flat(tmp_path / "set", "cat", "cat/2024/may", "cat/2024/june", "dog/all")
    data = load(str(root), cache=tmp_path)
    assert data.classes == ("cat", "dog")
    assert sizes(data) == (13, 3, 4)
    cats = sum("cat/" in name for split in ("train", "valid", "test") for name in names(data, split))
    assert cats == 15
    for split in (data.train, data.valid, data.test):
        found = [os.path.relpath(file, root).split("/")[0] for file in split.files or ()]
        assert found == [data.classes[label] for label in split.labels]


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    flat(tmp_path / "elsewhere", "tabby")
    root = flat(tmp_path / "set", "dog")
    (root / "cat").symlink_to(tmp_path / "elsewhere/tabby")
    (root / "dog/link.jpg").symlink_to(picture(tmp_path / "single.jpg", seed=9))
    data = load(str(root), cache=tmp_path)
    assert data.classes == ("cat", "dog")
    assert sum(sizes(data)) == 11


def test_names_with_spaces_and_other_letters(tmp_path: Path) -> None:
    root = flat(tmp_path / "meine Fotos ü", "Käse, alt", "小熊 猫", "a 'quoted' one", "train set")
    picture(root / "train set/IMG 0001 (1).JPEG", seed=50)
    picture(root / os.fsdecode(b"train set/na\xefve.png"), seed=51)
    data = load(str(root), cache=tmp_path)
    assert data.classes == ("Käse, alt", "a 'quoted' one", "train set", "小熊 猫")
    assert sum(sizes(data)) == 22
    fingerprint(data)


def test_the_same_name_in_two_forms_of_unicode_is_one_class(tmp_path: Path) -> None:
    """macOS writes é as e and an accent."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    root = flat(tmp_path / "set", f"train/{composed}", "train/tea", f"test/{decomposed}", "test/tea")
    assert load(str(root), cache=tmp_path).classes == (composed, "tea")
    flat(root, f"train/{decomposed}")
    with pytest.raises(EnvironmentUnusable, match=r"differ only in case or in the form of Unicode; merge them"):
        load(str(root), cache=tmp_path)


def test_class_folders_that_differ_only_in_case(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnusable, match=r"the class folders Cat and cat in .* differ only in case"):
        load(str(flat(tmp_path / "set", "cat", "Cat", "dog")), cache=tmp_path)


def test_a_class_name_that_is_not_utf8(tmp_path: Path) -> None:
    root = flat(tmp_path / "set", "dog", os.fsdecode(b"caf\xe9"))
    with pytest.raises(EnvironmentUnusable, match=r"caf\\udce9 is not UTF-8; rename it"):
        load(str(root), cache=tmp_path)


def test_a_test_part_that_equals_the_training_part_is_a_warning(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    shutil.rmtree(root / "test")
    shutil.copytree(root / "train", root / "test")
    assert load(str(root), cache=tmp_path).warnings == (
        "15 of 15 test images are also training or validation images, byte for byte; accuracies on the test split are "
        "too high",
    )


def test_equal_files_within_the_training_images(tmp_path: Path) -> None:
    root = flat(tmp_path / "set", "cat", "dog", count=10)
    assert load(str(root), cache=tmp_path).warnings == ()
    for i in range(10):
        shutil.copy(root / f"cat/{i}.jpg", root / f"cat/{i} (copy).jpg")
    shutil.copy(root / "cat/0.jpg", root / "dog/zero.jpg")
    warnings = load(str(root), cache=tmp_path).warnings
    assert [re.sub(r"^\d+ of \d+", "N", warning) for warning in warnings] == [
        "N test images are also training or validation images, byte for byte; accuracies on the test split are too "
        "high",
        "N valid images are also training images, byte for byte; accuracies on the valid split are too high",
        "3 images are in more than one class, byte for byte",
    ]


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = flat(tmp_path / "set", "cat", "dog")
    scandir = os.scandir

    def forbid(path: str) -> Iterator[os.DirEntry[str]]:  # the tests may run as root, whom no mode keeps out
        if path.endswith("cat"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    with pytest.raises(EnvironmentUnusable, match=r"cannot list .*cat: Permission denied"):
        load(str(root), cache=tmp_path)


@pytest.mark.parametrize(
    ("archive", "images", "classes", "note"),
    [
        ("photos21.tar", (672, 168, 420), 21, None),
        ("caltech101_500.tar", (300, 100, 100), 100, "a fifth of each class is the test part"),
    ],
)
def test_folders_of_photographs(
    shared_data: Path, tmp_path: Path, archive: str, images: tuple[int, int, int], classes: int, note: str | None
) -> None:
    with tarfile.open(shared_data / archive) as opened:
        opened.extractall(tmp_path / "set", filter="data")
    data = load(str(tmp_path / "set"), cache=tmp_path / "cache")
    assert (sizes(data), len(data.classes)) == (images, classes)
    assert data.warnings == ()
    assert not any(note.startswith("passed over") for note in data.notes)
    assert note is None or note in data.notes


def test_the_photos_that_come_with_the_project_are_unpacked_once(tmp_path: Path) -> None:
    data = load("caltech21", cache=tmp_path)
    assert (len(data.train) + len(data.valid), len(data.test), len(data.classes)) == (21 * 28, 21 * 20, 21)
    assert (data.name, data.resolution) == ("caltech21", 96)
    (folder,) = tmp_path.glob("caltech21-*")
    assert "CC BY 4.0" in (folder / "ATTRIBUTION.txt").read_text()
    assert [note for note in data.notes if "passed over" in note] == []
    before = folder.stat().st_mtime_ns
    assert fingerprint(load("caltech21", cache=tmp_path)) == fingerprint(data)
    assert folder.stat().st_mtime_ns == before
