"""Every kind of image file: read as Pillow reads it, by DALI or from a converted copy; checked once and recorded."""

import io
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from engine.data import image_files
from engine.data.dataset import Dataset, Split, load
from engine.data.image_files import check, shown, unreadable
from engine.data.loader import eval_batches, train_batches

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
TALL, WIDE = 36, 48  # a shorter side of 36 pixels is not resized for a network input of 32


def scene(seed: int = 0) -> Image.Image:
    """A smooth picture that is not symmetric in any way."""
    noise = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((WIDE, TALL), Image.Resampling.BICUBIC)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def transparent(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, WIDE).astype(np.uint8), (TALL, 1))))
    return image


def sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def rgb16_png(image: Image.Image) -> bytes:
    """A PNG of 16 bits per channel, which Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    lines = b"".join(b"\0" + line.tobytes() for line in np.asarray(image).astype(">u2") * 257)
    header = struct.pack(">IIBBBBB", WIDE, TALL, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def animated() -> dict[str, Any]:
    """Another picture after the first. Not one object for all: a saved image keeps settings that disturb the next."""
    return {"save_all": True, "append_images": [scene(1)]}


RGB = scene()
GREY, PALETTE = RGB.convert("L"), RGB.quantize(64)
# The image that is saved, and how; the last word of a name is the ending.
KINDS: dict[str, tuple[Image.Image, dict[str, Any]]] = {
    "plain.jpg": (RGB, {}),
    "progressive.jpeg": (RGB, {"progressive": True}),
    "grey.JPG": (GREY, {}),
    "cmyk.jpg": (RGB.convert("CMYK"), {}),
    "several.jpg": (RGB, {"format": "MPO", **animated()}),
    **{f"turned{i}.jpg": (RGB, {"exif": turned(i)}) for i in range(2, 9)},
    "plain.png": (RGB, {}),
    "grey.PNG": (GREY, {}),
    "palette.png": (PALETTE, {}),
    "palette-transparent.png": (PALETTE, {"transparency": 3}),
    "alpha.png": (transparent(RGB), {}),
    "grey-alpha.png": (transparent(GREY), {}),
    "bits.png": (RGB.convert("1"), {}),
    "animated.png": (RGB, animated()),
    "turned6.png": (RGB, {"exif": turned(6)}),
    "plain.webp": (RGB, {"lossless": True}),
    "lossy.webp": (RGB, {}),
    "alpha.webp": (transparent(RGB), {"lossless": True}),
    "animated.webp": (RGB, {"lossless": True, **animated()}),
    "turned6.webp": (RGB, {"lossless": True, "exif": turned(6)}),
    "plain.bmp": (RGB, {}),
    "palette.bmp": (PALETTE, {}),
    "bits.bmp": (RGB.convert("1"), {}),
    "plain.tif": (RGB, {}),
    "lzw.tiff": (RGB, {"compression": "tiff_lzw"}),
    "jpeg.tif": (RGB, {"compression": "jpeg"}),
    "palette.tif": (PALETTE, {}),
    "bits.tif": (RGB.convert("1"), {}),
    "cmyk.tif": (RGB.convert("CMYK"), {}),
    "alpha.tif": (transparent(RGB), {}),
    "pages.tif": (RGB, animated()),
    "turned6.tif": (RGB, {"exif": turned(6)}),
    "plain.gif": (PALETTE, {}),
    "animated.gif": (PALETTE, animated()),
    "transparent.gif": (PALETTE, {"transparency": 3}),
    "plain.avif": (RGB, {"quality": 95}),
    "turned6.avif": (RGB, {"quality": 95, "exif": turned(6)}),
    "a-webp-named.jpg": (RGB, {"format": "WEBP", "lossless": True}),
    "a-gif-named.jpg": (PALETTE, {"format": "GIF"}),
    "a-jpeg-named.png": (RGB, {"format": "JPEG"}),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, (image, options) in KINDS.items():
        image.copy().save(folder / name, **options)
    sixteen_bits(RGB).save(folder / "deep-grey.png")
    sixteen_bits(RGB).save(folder / "deep-grey.tif")
    (folder / "deep.png").write_bytes(rgb16_png(RGB))
    (folder / "no-end.png").write_bytes((folder / "plain.png").read_bytes()[:-2])
    return folder


def files_split(files: list[str], cache: Path) -> Split:
    checked = check(files, cache)
    assert checked.broken == {}
    converted = {files[i]: png for i, png in checked.converted.items()}
    return Split(np.zeros(len(files), np.int64), None, tuple(files), converted)


def as_loaded(split: Split) -> list[NDArray[np.float64]]:
    """The centre of each image as the loader gives it, in levels of 0..255."""
    data = Dataset("files", split, split, split, ("a",), MEAN, STD, 32, flip=False)
    batches = eval_batches(split, data=data, batch_size=16, resolution=0)
    return [255 * (image.permute(1, 2, 0).numpy() * STD + MEAN) for batch in batches for image in batch.images]


def centre(image: Image.Image) -> NDArray[np.uint8]:
    left, top = (image.width - 32) // 2, (image.height - 32) // 2
    return np.asarray(image.crop((left, top, left + 32, top + 32)))


def test_every_kind_of_file_has_the_pixels_that_pillow_reads(written: Path, tmp_path: Path) -> None:
    files = sorted(map(str, written.iterdir()))
    assert len(files) == len(KINDS) + 4
    for file, have in zip(files, as_loaded(files_split(files, tmp_path)), strict=True):
        if "deep" in file:  # the 8 high bits; Pillow cuts grey images of 16 bits off at 255
            want = (RGB if file.endswith("deep.png") else GREY).convert("RGB")
        else:
            with Image.open(file) as image:
                want = ImageOps.exif_transpose(image).convert("RGB")
        assert np.abs(have - centre(want)).max() < 0.6, file


@pytest.mark.parametrize("kind", ["png", "tif", "webp", "bmp"])
def test_a_turned_picture_is_shown_upright(written: Path, tmp_path: Path, kind: str) -> None:
    file = written / f"turned6.{kind}"
    if kind == "bmp":  # which has no orientation
        file = written / "plain.bmp"
    (have,) = as_loaded(files_split([str(file)], tmp_path))
    upright = RGB if kind == "bmp" else RGB.transpose(Image.Transpose.ROTATE_270)
    assert np.abs(have - centre(upright)).max() < 0.6


def test_only_what_dali_cannot_read_alike_is_converted(written: Path, tmp_path: Path) -> None:
    files = sorted(map(str, written.iterdir()))
    converted = {os.path.basename(file) for file in files_split(files, tmp_path).converted}
    assert converted == {
        *(name for name in map(os.path.basename, files) if name.endswith((".tif", ".tiff", ".gif", ".avif"))),
        "a-gif-named.jpg", "cmyk.jpg", "no-end.png", "animated.webp", "turned6.webp",
    }


def test_augmentation_does_not_depend_on_the_kind_of_file(tmp_path: Path) -> None:
    """The same pictures as PNG and as files of other kinds give the same batches, bit for bit."""
    kinds = [("png", "png"), ("tif", "png"), ("bmp", "png"), ("webp", "png")]
    given: dict[int, list[str]] = {0: [], 1: []}
    for i in range(8):
        for side, kind in enumerate(kinds[i % 4]):
            file = tmp_path / f"{i}.{side}.{kind}"
            scene(i).save(file, **({"lossless": True} if kind == "webp" else {}))
            given[side].append(str(file))
    batches = []
    for files in given.values():
        split = files_split(files, tmp_path / "cache")
        data = Dataset("files", split, split, split, ("a",), MEAN, STD, 32, flip=True)
        batches.append(
            train_batches(split, np.arange(8), data=data, batch_size=4, epochs=2, resolution=0, seed=5)
        )
    for one, other in zip(*batches, strict=True):
        assert np.array_equal(one.images.numpy(), other.images.numpy())


def test_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    file = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xff.png")
    RGB.save(file)
    (have,) = as_loaded(files_split([file], tmp_path / "cache"))
    assert np.abs(have - centre(RGB)).max() < 0.6
    assert shown(os.path.basename(file)) == r"caf\udce9 \udcff.png"


def cut(image: Image.Image, kind: str) -> bytes:
    image.resize((200, 150)).save(content := io.BytesIO(), kind)
    return content.getvalue()[: len(content.getvalue()) * 2 // 3]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("cut.jpg", cut(scene(), "JPEG"), "truncated"),
        ("cut.png", cut(scene(), "PNG"), "truncated"),
        ("cut.webp", cut(scene(), "WEBP"), "."),
        ("cut.bmp", cut(scene(), "BMP"), "truncated"),
        ("cut.tif", cut(scene(), "TIFF"), "."),
        ("cut.gif", cut(scene().quantize(64), "GIF"), "truncated"),
        ("empty.jpg", b"", "^empty$"),
        ("text.jpg", b"no image at all", "^not an image, despite its name$"),
        ("page.png", b"<html>404 not found</html>", "^not an image, despite its name$"),
    ],
)
def test_the_reason_why_a_file_cannot_be_read(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    checked = check([str(tmp_path / name)], tmp_path / "cache")
    assert re.search(reason, checked.broken[0])
    assert checked.converted == {}
    assert unreadable([str(tmp_path / name)]) == [f"{tmp_path / name}: {checked.broken[0]}"]


def test_pixels_of_32_bits_are_not_guessed_at(tmp_path: Path) -> None:
    RGB.convert("F").save(tmp_path / "heights.tif")
    assert check([str(tmp_path / "heights.tif")], tmp_path).broken == {0: "32-bit pixels; convert it to 8 bits"}


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (tmp_path / "round.jpg").symlink_to(tmp_path / "round.jpg")
    broken = check([str(tmp_path / "gone.jpg"), str(tmp_path / "round.jpg")], tmp_path).broken
    assert broken[0] == "dangling link"
    assert "Too many levels of symbolic links" in broken[1]


def test_a_check_is_recorded_and_only_what_failed_is_looked_at_again(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    decoded = image_files._decoded
    monkeypatch.setattr(image_files, "_decoded", lambda file: looked.append(os.path.basename(file)) or decoded(file))
    files = [str(written / name) for name in ("plain.jpg", "plain.gif", "plain.png")]
    (tmp_path / "bad.jpg").touch()
    files.append(str(tmp_path / "bad.jpg"))
    first = check(files, tmp_path / "cache")
    assert sorted(looked) == ["bad.jpg", "plain.gif", "plain.jpg", "plain.png"]
    looked.clear()
    assert check(files, tmp_path / "cache") == first
    assert looked == ["bad.jpg"]
    looked.clear()
    Path(first.converted[1]).unlink()  # somebody tidied the cache up
    assert check(files, tmp_path / "cache") == first
    assert sorted(looked) == ["bad.jpg", "plain.gif"]
    assert Path(first.converted[1]).exists()
    looked.clear()
    RGB.save(tmp_path / "bad.jpg")
    assert check(files, tmp_path / "cache").broken == {}
    assert len(looked) == 4


def test_files_with_the_same_content_are_found(tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 0), ("b", 1), ("c", 0), ("d", 2), ("e", 1), ("f", 0)):
        scene(seed).save(tmp_path / f"{name}.bmp")  # all of one size
        files.append(str(tmp_path / f"{name}.bmp"))
    assert check(files, tmp_path).copies == [[0, 2, 5], [1, 4]]


def test_a_folder_of_gif_and_tiff_files_is_loaded(tmp_path: Path) -> None:
    for c in range(2):
        for i in range(6):
            file = tmp_path / f"set/class{c}/{i}.{('gif', 'tif')[i % 2]}"
            file.parent.mkdir(parents=True, exist_ok=True)
            scene(10 * c + i).quantize(64).save(file)
    data = load(str(tmp_path / "set"), cache=tmp_path / "cache", resolution=32)
    assert (len(data.train), len(data.valid), len(data.test)) == (8, 2, 2)
    for split in (data.train, data.valid, data.test):
        assert len(as_loaded(split)) == len(split)
