"""What every backend guarantees: exact counts, keyed order and augmentation, layout, resume, errors."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from engine.data import augment, loader
from engine.data.batches import Batch
from engine.data.dataset import Dataset, Split
from engine.trial import EnvironmentUnusable, UsageError

BACKENDS = ["dali", "resident", "synthetic"]
PIXELS = ["dali", "resident"]  # the backends that yield the images of the data
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def arrays(count: int = 50, side: int = 32, flip: bool = True) -> Dataset:
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 10, count), rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8), None)
    return Dataset("arrays", split, split, split, tuple("abcdefghij"), MEAN, STD, side, flip)


def train(data: Dataset, indices: np.ndarray | None = None, **changes: object) -> loader.Batches:
    settings = {"batch_size": 8, "epochs": 2, "resolution": 0, "seed": 5} | changes
    chosen = np.arange(len(data.train)) if indices is None else indices
    return loader.train_batches(data.train, chosen, data=data, **settings)  # type: ignore[arg-type]


def by_index(batches: list[Batch]) -> dict[int, torch.Tensor]:
    return {int(i): image for batch in batches for i, image in zip(batch.indices, batch.images, strict=True)}


def expected(data: Dataset, index: int, epoch: int, seed: int = 5) -> torch.Tensor:
    """The definition, one image at a time in NumPy: black border, crop, mirror, mean and std."""
    assert data.train.images is not None
    image = data.train.images[index]
    side = len(image)
    pad = side // 8
    start, mirror = augment.crop_and_flip(seed, epoch, np.array([index]), pad, data.flip)
    y, x = start[0]
    crop = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))[y : y + side, x : x + side]
    crop = crop[:, ::-1] if mirror[0] else crop
    return torch.from_numpy(((crop / 255 - MEAN) / STD).astype(np.float32)).permute(2, 0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("count", "batch_size"), [(50, 8), (48, 8), (3, 8), (1, 1)])
def test_evaluation_gives_each_image_once_in_order(backend: str, count: int, batch_size: int) -> None:
    data = arrays(count)
    batches = loader.eval_batches(data.test, data=data, batch_size=batch_size, resolution=0, backend=backend)  # type: ignore[arg-type]
    for _ in range(2):
        got = list(batches)
        assert len(got) == len(batches) == -(-count // batch_size)
        assert torch.cat([b.indices for b in got]).tolist() == list(range(count))
        assert torch.cat([b.labels for b in got]).tolist() == data.test.labels.tolist()
        assert all(len(b.images) == len(b.labels) for b in got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_and_types(backend: str) -> None:
    for batch in [
        next(iter(train(arrays(), backend=backend))),
        next(iter(train(arrays(), backend=backend, resolution=24))),
    ]:
        assert batch.images.shape in [(8, 3, 32, 32), (8, 3, 24, 24)]
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert (batch.labels.dtype, batch.indices.dtype) == (torch.int64, torch.int64)
        assert batch.labels.shape == batch.indices.shape == (8,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_follows_the_keyed_order_of_the_subset(backend: str) -> None:
    data, indices = arrays(), np.array([3, 4, 9, 11, 20, 21, 22, 30, 41, 48, 49])
    batches = train(data, indices, batch_size=4, epochs=3, backend=backend)
    got = [batch.indices.tolist() for batch in batches]
    assert (batches.steps_per_epoch, len(batches), len(got)) == (2, 6, 6)
    for epoch in range(3):
        order = indices[augment.permutation(5, epoch, 11)][:8].tolist()  # the last three do not fill a batch
        assert got[2 * epoch] + got[2 * epoch + 1] == order
    for batch in batches:
        assert batch.labels.tolist() == data.train.labels[batch.indices].tolist()


@pytest.mark.parametrize("backend", PIXELS)
@pytest.mark.parametrize(("side", "flip"), [(32, True), (32, False), (24, True), (8, True)])
def test_pixels_follow_the_definition_of_crop_and_mirror(backend: str, side: int, flip: bool) -> None:
    data = arrays(side=side, flip=flip)
    batches = train(data, backend=backend)
    for step, batch in enumerate(batches):
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            torch.testing.assert_close(image, expected(data, index, step // 6), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", PIXELS)
def test_all_81_positions_and_both_mirrors_occur_and_are_right(backend: str) -> None:
    data = arrays(400)
    seen = set()
    for step, batch in enumerate(train(data, batch_size=100, epochs=3, backend=backend)):
        start, mirror = augment.crop_and_flip(5, step // 4, batch.indices.numpy(), 4, True)
        seen |= {(y, x, m) for (y, x), m in zip(start.tolist(), mirror.tolist(), strict=True)}
        want = torch.stack([expected(data, i, step // 4) for i in batch.indices.tolist()])
        torch.testing.assert_close(batch.images, want, atol=2e-6, rtol=1e-5)
    assert len(seen) == 162


@pytest.mark.parametrize("backend", PIXELS)
def test_an_image_does_not_depend_on_batch_size_or_subset(backend: str) -> None:
    data = arrays()
    whole = by_index(list(train(data, epochs=1, batch_size=50, backend=backend)))
    split = by_index(list(train(data, np.arange(10, 40), epochs=1, batch_size=7, backend=backend)))
    assert len(split) == 28
    for index, image in split.items():
        assert torch.equal(image, whole[index])


@pytest.mark.parametrize("backend", PIXELS)
@pytest.mark.parametrize("change", [{"seed": 6}, {"first_epoch": 1}])
def test_another_seed_or_epoch_gives_other_pixels(backend: str, change: dict[str, int]) -> None:
    data = arrays()
    one = by_index(list(train(data, epochs=1, batch_size=50, backend=backend)))
    epochs = 1 + change.get("first_epoch", 0)
    other = by_index(list(train(data, **{"epochs": epochs, "batch_size": 50, "backend": backend} | change)))
    assert sum(torch.equal(one[i], other[i]) for i in one) < 5  # 1 in 162 by chance


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_sees_the_rest_of_the_uninterrupted_one(backend: str) -> None:
    data = arrays()
    uninterrupted = list(train(data, epochs=4, backend=backend))
    resumed = train(data, epochs=4, first_epoch=2, backend=backend)
    assert len(resumed) == 12
    for batch, again in zip(uninterrupted[12:], resumed, strict=True):
        assert torch.equal(batch.indices, again.indices)
        assert torch.equal(batch.images, again.images)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_abandoned_iteration_does_not_disturb_the_next(backend: str) -> None:
    batches = train(arrays(), backend=backend)
    first = next(iter(batches))
    again = next(iter(batches))
    assert torch.equal(first.indices, again.indices)
    assert torch.equal(first.images, again.images)


@pytest.mark.parametrize("resolution", [16, 24, 48])
def test_backends_resize_alike(resolution: int) -> None:
    data = arrays()
    dali, resident = (by_index(list(train(data, resolution=resolution, backend=b))) for b in PIXELS)
    for index, image in dali.items():
        # The image is noise, the unit is STD. At the border DALI repeats the edge and torch leaves it out.
        inner = (slice(None), slice(2, -2), slice(2, -2))
        torch.testing.assert_close(image[inner], resident[index][inner], atol=0.03, rtol=0)


@pytest.mark.parametrize("threads", [1, 2])
def transformed(pixels: torch.Tensor, operations: augment.Operations, row: int) -> torch.Tensor:
    """The definition of an operation of TrivialAugment, in torch; pixels (3, H, W) in 0..255."""
    matrix, colour = torch.from_numpy(operations.matrix[row]), operations.colour[row].astype(np.float64)
    linear, shift = matrix[:, :2], matrix[:, 2] - 0.5 + matrix[:, :2].sum(1) / 2
    grid = torch.nn.functional.affine_grid(
        torch.cat([linear, 2 * shift[:, None]], 1)[None], [1, *pixels.shape], align_corners=False
    )
    moved = torch.nn.functional.grid_sample(pixels[None], grid, align_corners=False)[0].round().double()
    grey = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)
    luma = (moved * grey).sum(0, keepdim=True)
    coloured = luma + (moved - luma) * colour[2]
    coloured = (128 + (coloured - 128) * colour[1]) * colour[0]
    kept = coloured.clamp(0, 255).round().long() & int(operations.bits[row, 0])
    return torch.where(kept > int(operations.threshold[row, 0]), 255 - kept, kept).double()


def test_trivial_augment_follows_its_definition() -> None:
    data, grid = arrays(400, flip=False), np.indices((32, 32))
    smooth = (128 + 90 * np.sin(grid[0] / 5) * np.cos(grid[1] / 7)).astype(np.uint8)
    assert data.train.images is not None
    data.train.images[:] = (smooth[None, :, :, None] + data.train.images // 16).astype(np.uint8)
    seen = {}
    for kind in ("crop", "trivial"):
        settings = {"epochs": 1, "augmentation": augment.Augmentation(kind), "batch_size": 16}
        seen[kind] = by_index(list(train(data, **settings)))
    operations = augment.trivial(5, 0, np.arange(400))
    std, mean = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (STD, MEAN))
    for index, image in seen["trivial"].items():
        plain = ((seen["crop"][index] * std + mean) * 255).round().float()
        wanted, got = transformed(plain, operations, index), (image * std + mean) * 255
        wrong = (wanted - got).abs() > 2.5
        # Rounding differs where bits are dropped, and at the edge of what was uncovered.
        assert wrong.double().mean() < 0.06, index


def test_trivial_augment_does_not_depend_on_the_batch(files: Dataset) -> None:
    settings = {"epochs": 1, "augmentation": augment.Augmentation("trivial", 0.5)}
    whole = by_index(list(train(files, **settings)))
    others = by_index(list(train(files, batch_size=3, **settings)))
    assert all(torch.equal(others[index], image) for index, image in whole.items() if index in others)
    plain = by_index(list(train(files, epochs=1, augmentation=augment.Augmentation("crop", 0.5))))
    assert any(not torch.equal(plain[index], image) for index, image in whole.items())


def test_trivial_augment_needs_dali() -> None:
    with pytest.raises(UsageError, match="--augment trivial is computed by DALI"):
        train(arrays(), backend="resident", augmentation=augment.Augmentation("trivial"))


@pytest.mark.parametrize("threads", [1, 2])
def test_dali_outputs_are_not_copied_and_not_overwritten(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[int] = []
    convert = torch.from_dlpack

    def spy(tensor: object) -> torch.Tensor:
        addresses.append(tensor.data_ptr())  # type: ignore[attr-defined]
        return convert(tensor)

    monkeypatch.setattr(torch, "from_dlpack", spy)
    data = arrays()
    kept = list(train(data, epochs=4, threads=threads))
    assert [batch.images.data_ptr() for batch in kept] == addresses
    assert len(set(addresses)) == 24  # all are alive at once, and none share memory
    for step, batch in enumerate(kept):
        index = int(batch.indices[0])
        torch.testing.assert_close(batch.images[0], expected(data, index, step // 6), atol=2e-6, rtol=1e-5)


def test_memory_mapped_images_can_be_read(tmp_path: Path) -> None:
    data = arrays()
    np.save(tmp_path / "images.npy", data.train.images)
    mapped = dataclasses.replace(data.train, images=np.load(tmp_path / "images.npy", mmap_mode="r"))
    want, got = (next(iter(train(dataclasses.replace(data, train=p)))) for p in (data.train, mapped))
    assert torch.equal(want.images, got.images)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """23 smooth pictures of odd sizes, in every mode that a folder may contain."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    modes = ["RGB.jpg", "L.jpg", "CMYK.jpg", "RGB.png", "L.png", "P.png", "RGBA.png", "1.png"]
    paths = []
    for i in range(23):
        mode, _, ending = modes[i % len(modes)].partition(".")
        size = (int(rng.integers(60, 150)), int(rng.integers(60, 150)))
        noise = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        paths.append(str(folder / f"{i}.{ending}"))
        noise.convert(mode).save(paths[-1], **({"quality": 95} if ending == "jpg" else {}))
    split = Split(rng.integers(0, 10, 23), None, tuple(paths))
    return Dataset("files", split, split, split, tuple("abcdefghij"), MEAN, STD, 32, flip=True)


def test_files_in_evaluation_match_torchvision(files: Dataset) -> None:
    batches = loader.eval_batches(files.test, data=files, batch_size=8, resolution=0)
    got = list(batches)
    assert [len(batch.labels) for batch in got] == [8, 8, 7]
    assert torch.cat([batch.indices for batch in got]).tolist() == list(range(23))
    assert torch.cat([batch.labels for batch in got]).tolist() == files.test.labels.tolist()
    assert files.test.files is not None
    for index, image in by_index(got).items():
        if index % 8 in (2, 6):  # CMYK and transparency: libraries convert them differently, see below
            continue
        picture = v2.functional.resize(Image.open(files.test.files[index]).convert("RGB"), 36, antialias=True)
        have = image.permute(1, 2, 0).numpy() * STD + MEAN
        errors = []
        for more in (0, 1):  # with an odd number of extra pixels, the centre is between two
            left, top = (picture.width - 32 + more) // 2, (picture.height - 32 + more) // 2
            want = np.asarray(picture.crop((left, top, left + 32, top + 32))) / 255
            errors.append(np.abs(have - want).mean())
        assert min(errors) < 0.02, files.test.files[index]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("mode", "tolerance"), [("RGB", 3), ("L", 3), ("CMYK", 40), ("RGBA", 3), ("EXIF", 8)])
def test_colours_and_orientation_are_those_of_the_file(
    tmp_path: Path, mode: str, tolerance: float, training: bool
) -> None:
    """A picture of one colour keeps that colour (CMYK within the differences of libraries). One that was taken with the
    camera turned is shown upright, with its light half on top."""
    colour = (200, 90, 40)
    picture = Image.new("RGB", (64, 64), colour)
    exif = Image.Exif()
    if mode == "EXIF":
        picture.paste((0, 0, 0), (0, 0, 32, 64))
        exif[0x0112] = 6  # rotate by 90 degrees clockwise: the left side of the file comes to the top
        colour = (100, 45, 20)  # on the average
    path = tmp_path / ("a.png" if mode == "RGBA" else "a.jpg")
    options = {} if mode == "RGBA" else {"quality": 95}
    picture.convert("RGB" if mode == "EXIF" else mode).save(path, exif=exif, **options)
    split = Split(np.zeros(4, np.int64), None, (str(path),) * 4)
    data = Dataset("files", split, split, split, ("a", "b"), MEAN, STD, 32, flip=True)
    if training:
        batches = train(data, epochs=1, batch_size=4)
    else:
        batches = loader.eval_batches(split, data=data, batch_size=4, resolution=0)
    images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).numpy() * STD + MEAN
    if not training or mode != "EXIF":  # a random crop may show more of either half
        assert np.abs(images.mean((0, 1, 2)) * 255 - np.array(colour if mode != "L" else [117] * 3)).max() < tolerance
    if mode == "EXIF" and not training:
        assert images[:, :12].mean() < 0.1 < images[:, -12:].mean()


def test_files_in_training_are_keyed_by_seed_epoch_and_index(files: Dataset) -> None:
    batches = train(files)
    got = list(batches)
    assert (len(got), batches.steps_per_epoch) == (4, 2)
    assert got[0].images.shape == (8, 3, 32, 32)
    assert got[0].images.is_contiguous(memory_format=torch.channels_last)
    for epoch in range(2):
        order = augment.permutation(5, epoch, 23)[:16].tolist()
        assert torch.cat([batch.indices for batch in got[2 * epoch : 2 * epoch + 2]]).tolist() == order
    first, second = by_index(got[:2]), by_index(got[2:])
    subset = by_index(list(train(files, np.arange(3, 21), epochs=1, batch_size=5)))
    both = first.keys() & subset.keys()
    assert len(both) > 5
    assert all(torch.equal(first[i], subset[i]) for i in both)
    assert not any(torch.equal(first[i], second[i]) for i in first.keys() & second.keys())
    for batch in got:
        assert batch.labels.tolist() == files.train.labels[batch.indices].tolist()


def test_files_are_cropped_by_their_key(files: Dataset) -> None:
    assert files.train.files is not None
    for index, image in by_index(list(train(files, epochs=1, batch_size=23))).items():
        if index % 8 in (2, 6):
            continue
        picture = Image.open(files.train.files[index]).convert("RGB")
        box, mirror = augment.resized_crop(5, 0, np.array([index]), True)
        area, ratio, y, x = box[0].tolist()
        wide = min((area * picture.width * picture.height * ratio) ** 0.5, picture.width)
        tall = min((area * picture.width * picture.height / ratio) ** 0.5, picture.height)
        left, top = x * (picture.width - wide), y * (picture.height - tall)
        crop = picture.resize((32, 32), Image.Resampling.BILINEAR, box=(left, top, left + wide, top + tall))
        want = np.asarray(crop)[:, ::-1] if mirror[0] else np.asarray(crop)
        have = image.permute(1, 2, 0).numpy() * STD + MEAN
        assert np.abs(have - want / 255).mean() < 0.02, files.train.files[index]


def test_long_trainings_on_files_build_a_new_pipeline_every_few_epochs(
    files: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_list = list(train(files, epochs=5))
    built = []
    build = loader._file_pipeline
    monkeypatch.setattr(loader, "_LISTED", 32)
    monkeypatch.setattr(loader, "_file_pipeline", lambda *args: built.append(args[1]) or build(*args))
    for batch, again in zip(one_list, train(files, epochs=5), strict=True):
        assert torch.equal(batch.indices, again.indices)
        assert torch.equal(batch.images, again.images)
    assert built == [range(0, 4), range(4, 8), range(8, 10)]


def test_a_file_that_breaks_after_the_check_is_named(files: Dataset, tmp_path: Path) -> None:
    assert files.train.files is not None
    text, cut = tmp_path / "text.jpg", tmp_path / "cut.jpg"
    text.write_text("no image at all")
    cut.write_bytes(Path(files.train.files[0]).read_bytes()[:700])
    split = dataclasses.replace(files.train, files=(str(text), str(cut), *files.train.files[2:]))
    batches = loader.eval_batches(split, data=files, batch_size=8, resolution=0)
    with pytest.raises(EnvironmentUnusable, match=r"text.jpg: not an image, despite its name\n.*cut.jpg: .*truncated"):
        list(batches)


def test_a_file_that_only_dali_cannot_decode_is_named(files: Dataset, tmp_path: Path) -> None:
    """The check converts such a file; here none was made."""
    picture = tmp_path / "no-end.png"
    Image.new("RGB", (60, 60)).save(picture)
    picture.write_bytes(picture.read_bytes()[:-5])
    assert files.train.files is not None
    split = dataclasses.replace(files.train, files=(*files.train.files[:22], str(picture)))
    batches = loader.eval_batches(split, data=files, batch_size=8, resolution=0)
    with pytest.raises(EnvironmentUnusable, match=r"DALI cannot decode these images.*\n  .*no-end.png$"):
        list(batches)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_images_than_a_batch(backend: str) -> None:
    with pytest.raises(UsageError, match="7 training images are fewer than a batch of 8"):
        train(arrays(), np.arange(7), backend=backend)


def test_an_unsuitable_backend_is_refused(files: Dataset) -> None:
    with pytest.raises(UsageError, match="'tfrecord': choose one of dali, resident, synthetic"):
        train(arrays(), backend="tfrecord")
    with pytest.raises(UsageError, match="image files need the backend dali"):
        train(files, backend="resident")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_refused() -> None:
    with pytest.raises(EnvironmentUnusable, match=r"device cuda:0: no CUDA device is visible; use --device cpu"):
        train(arrays(), device="cuda:0")


def test_without_dali_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(EnvironmentUnusable, match=r"pip install nvidia-dali-cuda130.*backend resident"):
        next(iter(train(arrays())))
    assert len(list(train(arrays(), backend="resident"))) == 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", PIXELS)
def test_cuda_gives_half_precision_of_the_same_pixels(backend: str) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")  # a GPU machine may not have it
    data = arrays()
    for host, device in zip(train(data, backend=backend), train(data, backend=backend, device="cuda:0"), strict=True):
        assert (device.images.device.type, device.images.dtype) == ("cuda", torch.float16)
        assert device.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(host.indices, device.indices.cpu())
        torch.testing.assert_close(device.images.cpu().float(), host.images, atol=4e-3, rtol=2e-3)
