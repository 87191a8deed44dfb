"""Image datasets: the published ones where present, small ones in their layout, bad files."""

import dataclasses
import gzip
import hashlib
import io
import struct
import sys
import tarfile

import numpy as np
import pytest

from jaxnets.data import ImageDataset, cifar10, digits, fashion_mnist, mnist
from jaxnets.data.datasets import cifar, images
from jaxnets.data.datasets.images import decode_idx
from jaxnets.data.files import find


@pytest.fixture
def empty_places(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXNETS_DATA", raising=False)
    monkeypatch.setattr("jaxnets.data.files.SYSTEM_FOLDERS", ())


def needs(*files):
    """Skip unless one of the files of a dataset is on this machine."""
    return pytest.mark.skipif(
        find(files) is None, reason=f"{files[0].name} is not here; set JAXNETS_DATA to its folder"
    )


def assert_statistics_are_those_of_the_training_pixels(dataset):
    height, width, channels = dataset.image_shape
    pixels = dataset.train["inputs"].reshape(len(dataset.train["inputs"]), -1)
    assert len(pixels) * 255**2 < 2**32  # so that the sums over images are exact in uint32
    sums = pixels.sum(axis=0, dtype=np.uint32)
    squares = np.einsum("ij,ij->j", pixels, pixels, dtype=np.uint32, casting="unsafe")
    count = len(pixels) * height * width
    mean, square = (
        total.reshape(-1, channels).sum(axis=0, dtype=np.uint64) / count / scale
        for total, scale in ((sums, 255), (squares, 255**2))
    )
    std = np.sqrt(square - mean**2)
    np.testing.assert_allclose(dataset.mean, mean, atol=5.1e-5, rtol=0)
    np.testing.assert_allclose(dataset.std, std, atol=5.1e-5, rtol=0)


# Digits


def test_digits_are_split_into_the_same_stratified_parts_every_time():
    first, second = digits(), digits()
    assert (len(first.train["labels"]), len(first.test["labels"])) == (1437, 360)
    np.testing.assert_array_equal(first.test["inputs"], second.test["inputs"])
    everything = np.bincount(first.train["labels"]) + np.bincount(first.test["labels"])
    assert np.abs(np.bincount(first.test["labels"]) - everything * 360 / 1797).max() < 1


def test_digits_keep_every_gray_level_of_the_original():
    from sklearn.datasets import load_digits

    dataset = digits()
    both = np.concatenate([dataset.train["inputs"], dataset.test["inputs"]])
    assert both.dtype == np.uint8
    restored = {image.tobytes() for image in np.rint(both[..., 0] * (16 / 255)).astype(np.uint8)}
    assert restored == {image.tobytes() for image in load_digits().images.astype(np.uint8)}


def test_digits_have_the_statistics_they_name():
    assert_statistics_are_those_of_the_training_pixels(digits())


def test_a_dataset_with_a_label_out_of_range_is_refused():
    part = {"inputs": np.zeros((2, 4, 4, 1), np.uint8), "labels": np.array([0, 2], np.int32)}
    with pytest.raises(ValueError, match=r"outside \[0, 2\), first 2"):
        ImageDataset("odd", part, part, ("a", "b"), (0.5,), (0.5,))


# IDX


@pytest.mark.parametrize(
    "code, kind", [(8, "B"), (9, "b"), (11, "h"), (12, "i"), (13, "f"), (14, "d")]
)
def test_every_type_of_idx_value_is_read(code, kind):
    values = [[1, 2, 3], [4, 5, 100]]
    content = struct.pack(f">4B2I6{kind}", 0, 0, code, 2, 2, 3, *np.ravel(values).tolist())
    decoded = decode_idx(content)
    assert decoded.tolist() == values
    assert decoded.dtype == np.dtype(kind)


HEADER = struct.pack(">4B2I", 0, 0, 8, 2, 2, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX header"),
        (b"\x1f\x8b\x08\x00", "not an IDX header"),
        (b"\0\0\x07\x01\0\0\0\0", "not an IDX header"),
        (HEADER[:9], "ends within its header of 12 bytes"),
        (HEADER + b"12345", r"holds 17 bytes, .* shape \(2, 3\) of uint8, 18 bytes"),
        (HEADER + b"1234567", "holds 19 bytes"),
        (bytes([0, 0, 8, 65]) + bytes(4 * 65), "announces 65 axes; at most 32 are read"),
        (bytes([0, 0, 8, 255]) + bytes(4 * 255), "announces 255 axes"),
        (bytes([0, 0, 8, 4]) + b"\xff" * 12 + bytes(4), r"announces shape \(4294967295, "),
    ],
)
def test_a_malformed_idx_file_is_refused(content, message):
    with pytest.raises(ValueError, match=f"digits.idx .*{message}"):
        decode_idx(content, name="digits.idx")


def write_idx_dataset(folder, files):
    """Write a tiny dataset in the IDX layout; return its files with matching digests."""
    pinned = []
    for file, count in zip(files, (3, 3, 2, 2), strict=True):
        if "images" in file.name:
            content = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + bytes(
                position % 251 for position in range(count * 784)
            )
        else:
            content = struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(range(count))
        pinned.append(dataclasses.replace(file, sha256=hashlib.sha256(content).hexdigest()))
        (folder / file.name).write_bytes(gzip.compress(content))
    return tuple(pinned)


def test_the_four_idx_files_become_images_and_labels(tmp_path, monkeypatch, empty_places):
    monkeypatch.setattr(images, "MNIST_FILES", write_idx_dataset(tmp_path, images.MNIST_FILES))
    dataset = mnist(tmp_path, download=False)
    assert dataset.train["inputs"].shape == (3, 28, 28, 1)
    assert dataset.train["inputs"][1, 0, :3, 0].tolist() == [784 % 251, 785 % 251, 786 % 251]
    assert dataset.test["labels"].tolist() == [0, 1]
    assert dataset.test["labels"].dtype == np.int32
    assert (dataset.num_classes, dataset.image_shape) == (10, (28, 28, 1))


@pytest.mark.parametrize(
    "load, files", [(mnist, "MNIST_FILES"), (fashion_mnist, "FASHION_MNIST_FILES")]
)
def test_a_file_of_another_dataset_with_the_same_name_is_refused(
    tmp_path, empty_places, load, files
):
    write_idx_dataset(tmp_path, getattr(images, files))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is not the published file"):
        load(tmp_path, download=False)


@pytest.mark.parametrize("load", [mnist, fashion_mnist, cifar10])
def test_a_missing_dataset_is_an_error_with_the_address(empty_places, load):
    with pytest.raises(FileNotFoundError, match="download http"):
        load(download=False)


def test_pinned_files_have_whole_digests_and_distinct_names():
    for files in (images.MNIST_FILES, images.FASHION_MNIST_FILES, (cifar.ARCHIVE, *cifar.BINARIES)):
        assert len({file.name for file in files}) == len(files)
        assert all(len(bytes.fromhex(file.sha256)) == 32 for file in files)


@needs(*images.MNIST_FILES)
def test_mnist_is_the_published_one():
    dataset = mnist(download=False)
    assert dataset.train["labels"][:5].tolist() == [5, 0, 4, 1, 9]
    # Class counts as published.
    assert np.bincount(dataset.train["labels"]).tolist() == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    ]
    assert len(dataset.test["labels"]) == 10_000
    assert_statistics_are_those_of_the_training_pixels(dataset)


@needs(*images.FASHION_MNIST_FILES)
def test_fashion_mnist_is_the_published_one():
    dataset = fashion_mnist(download=False)
    assert dataset.class_names[dataset.train["labels"][0]] == "ankle boot"
    assert np.bincount(dataset.train["labels"]).tolist() == [6000] * 10
    assert np.bincount(dataset.test["labels"]).tolist() == [1000] * 10
    assert_statistics_are_those_of_the_training_pixels(dataset)


# CIFAR-10


def make_binaries(folder):
    """Write six small .bin files; return them with matching digests, and the pixels of each."""
    generator = np.random.default_rng(0)
    pinned, pixels = [], []
    for file in cifar.BINARIES:
        images = generator.integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
        content = b"".join(
            bytes([label]) + b"".join(image[:, :, channel].tobytes() for channel in range(3))
            for label, image in enumerate(images)
        )
        (folder / file.name).write_bytes(content)
        pinned.append(dataclasses.replace(file, sha256=hashlib.sha256(content).hexdigest()))
        pixels.append(images)
    return tuple(pinned), pixels


@pytest.fixture
def small_cifar(tmp_path, monkeypatch, empty_places):
    """Make a small CIFAR-10 in the binary layout; return its folder and its pixels."""
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    binaries, pixels = make_binaries(folder)
    monkeypatch.setattr(cifar, "BINARIES", binaries)
    monkeypatch.setattr(cifar, "LAYOUTS", (binaries[0], *cifar.LAYOUTS[1:]))
    return folder, pixels


def assert_is_small_cifar(dataset, pixels):
    assert dataset.name == "CIFAR-10"
    np.testing.assert_array_equal(dataset.train["inputs"], np.concatenate(pixels[:5]))
    np.testing.assert_array_equal(dataset.test["inputs"], pixels[5])
    assert dataset.train["labels"].tolist() == [0, 1, 2] * 5


def test_the_binary_version_is_read_plane_by_plane(small_cifar):
    folder, pixels = small_cifar
    assert_is_small_cifar(cifar10(folder.parent, download=False), pixels)


@pytest.fixture
def small_archive(small_cifar, tmp_path, monkeypatch):
    """Make a small archive of CIFAR-10; return its path and its pixels."""
    folder, pixels = small_cifar
    path = tmp_path / "elsewhere" / "cifar-10-binary.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "cifar-10-batches-bin")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    pinned = dataclasses.replace(cifar.ARCHIVE, sha256=digest)
    monkeypatch.setattr(cifar, "ARCHIVE", pinned)
    monkeypatch.setattr(cifar, "LAYOUTS", (cifar.LAYOUTS[0], pinned))
    return path, pixels


def test_the_published_archive_is_read_without_being_extracted(small_archive, tmp_path):
    path, pixels = small_archive
    before = sorted(tmp_path.rglob("*"))
    assert_is_small_cifar(cifar10(path.parent, download=False), pixels)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_archive_is_not_unpacked_before_its_digest_is_known(small_archive, monkeypatch):
    path, _ = small_archive
    with tarfile.open(path, "w:gz") as archive:
        archive.add(__file__, "cifar-10-batches-bin/test_batch.bin")
    monkeypatch.setattr(cifar, "open_archive", None)
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz is not the published file"):
        cifar10(path.parent, download=False)


def test_a_missing_part_of_the_binary_version_is_named(small_cifar):
    folder, _ = small_cifar
    (folder / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_4\.bin is missing; extract it from"):
        cifar10(folder, download=False)


def test_a_truncated_part_of_the_binary_version_is_named(small_cifar):
    folder, _ = small_cifar
    path = folder / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"test_batch.bin is not the published .*\(9218 bytes\)"):
        cifar10(folder, download=False)


def test_a_broken_record_is_refused():
    with pytest.raises(ValueError, match=r"x\.bin holds 3072 bytes, not a whole number"):
        cifar.decode_records(bytes(3072), name="x.bin")


def test_a_pickled_version_is_not_read(tmp_path, empty_places):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(FileNotFoundError):
        cifar10(tmp_path, download=False)


@pytest.fixture
def small_jpeg(tmp_path, monkeypatch, empty_places):
    """Make a small CIFAR-10 in the JPEG layout; return its folder and its original pixels."""
    Image = pytest.importorskip("PIL.Image")
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    pixels = np.stack([np.broadcast_to(ramp[:, None, None], (32, 32, 3)) // n for n in (1, 2, 3)])
    encoded = []
    for image in pixels:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=75)
        encoded.append(stream.getvalue())
    arrays = {
        "jpeg": np.frombuffer(b"".join(encoded), np.uint8),
        "offsets": np.cumsum([0, *map(len, encoded)]),
        "labels": np.array([7, 8, 9], np.uint8),
    }
    path = tmp_path / "data" / "cifar10_jpeg.npz"
    path.parent.mkdir()
    np.savez(
        path, **{f"{part}_{name}": a for part in ("train", "test") for name, a in arrays.items()}
    )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    pinned = dataclasses.replace(cifar.JPEG, sha256=digest)
    monkeypatch.setattr(cifar, "JPEG", pinned)
    monkeypatch.setattr(cifar, "LAYOUTS", (*cifar.LAYOUTS[:2], pinned))
    return path.parent, pixels


def test_the_jpeg_layout_says_so_in_its_name_and_is_close_to_the_pixels(small_jpeg):
    folder, pixels = small_jpeg
    dataset = cifar10(folder, download=False)
    assert dataset.name == "CIFAR-10 (JPEG q75)"
    assert dataset.train["labels"].tolist() == [7, 8, 9]
    difference = dataset.test["inputs"].astype(int) - pixels
    assert np.abs(difference).max() < 12


def test_decoded_pixels_are_cached_and_a_damaged_cache_is_replaced(
    small_jpeg, tmp_path, monkeypatch
):
    folder, _ = small_jpeg
    first = cifar10(folder, download=False)
    cached = sorted((tmp_path / "cache/jaxnets/cifar10_jpeg").iterdir())
    assert [path.name.split("-")[0] for path in cached] == ["test", "test", "train", "train"]
    content = bytearray(cached[2].read_bytes())
    content[200] ^= 1  # one bit of one pixel
    cached[2].write_bytes(content)
    with pytest.warns(UserWarning, match="train-.*is damaged and is made anew"):
        again = cifar10(folder, download=False)
    np.testing.assert_array_equal(first.train["inputs"], again.train["inputs"])
    monkeypatch.setitem(sys.modules, "PIL", None)  # nothing is decoded from here on
    third = cifar10(folder, download=False)
    np.testing.assert_array_equal(first.train["inputs"], third.train["inputs"])


def test_a_cache_that_cannot_be_written_costs_only_a_warning(small_jpeg, tmp_path, monkeypatch):
    folder, _ = small_jpeg
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.warns(UserWarning, match="is not cached"):
        assert len(cifar10(folder, download=False).test["labels"]) == 3


def test_missing_pillow_is_reported_with_the_remedy(small_jpeg, monkeypatch):
    folder, _ = small_jpeg
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        cifar10(folder, download=False)


@needs(*cifar.LAYOUTS)
def test_cifar10_has_its_classes_in_equal_numbers_and_the_statistics_it_names():
    pytest.importorskip("PIL")
    dataset = cifar10(download=False)
    assert np.bincount(dataset.train["labels"]).tolist() == [5000] * 10
    assert np.bincount(dataset.test["labels"]).tolist() == [1000] * 10
    assert dataset.image_shape == (32, 32, 3)
    assert_statistics_are_those_of_the_training_pixels(dataset)
