"""The image processor: sizes, filters and pixels, and what it reads of preprocessor_config.json."""

import dataclasses
import errno
import json
import os
import sys

import numpy as np
import pytest

from jaxnets.pretrained.processors import ImageProcessor

RAW = ImageProcessor(size=None, rescale=None, mean=None, std=None)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_pixels_are_rescaled_and_normalized_channel_by_channel():
    mean, std = (0.1, 0.2, 0.3), (0.5, 2.0, 4.0)
    images = [picture(2, 3), picture(2, 3, seed=1)]
    processed = ImageProcessor(size=None, mean=mean, std=std)(images)
    assert processed.shape == (2, 2, 3, 3) and processed.dtype == np.float32
    expected = (np.stack(images).astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(processed, expected, atol=1e-6)
    np.testing.assert_array_equal(RAW(images), np.stack(images).astype(np.float32))
    halved = dataclasses.replace(RAW, rescale=0.5)(images)
    np.testing.assert_array_equal(halved, np.stack(images) / 2)


def test_a_box_filter_averages_the_pixels_of_each_box():
    image = picture(4, 6)
    resized = dataclasses.replace(RAW, size=(2, 3), resample="box")([image])
    expected = image.reshape(2, 2, 3, 2, 3).mean(axis=(1, 3))
    assert np.abs(resized[0] - expected).max() <= 1  # Pillow rounds after each of the two axes


def test_a_bilinear_filter_is_a_triangle_of_the_new_distance_between_pixels():
    row = np.repeat(np.array([0, 40, 80, 200], np.uint8)[None, :, None], 3, axis=2)
    resized = dataclasses.replace(RAW, size=(1, 2))([row])
    # Centers lie at 1 and 3; the triangle reaches 2 pixels to both sides.
    weights = np.array([[0.75, 0.75, 0.25, 0.0], [0.0, 0.25, 0.75, 0.75]]) / 1.75
    assert np.abs(resized[0, 0, :, 0] - weights @ [0, 40, 80, 200]).max() <= 0.5


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "hamming", "bicubic", "lanczos"])
def test_every_filter_leaves_an_image_of_the_right_size_alone(resample):
    image = picture(5, 7)
    resized = dataclasses.replace(RAW, size=(5, 7), resample=resample)([image])
    np.testing.assert_array_equal(resized[0], image)


@pytest.mark.parametrize(
    ("shape", "expected"), [((31, 17), (21, 12)), ((17, 31), (12, 21)), ((9, 9), (12, 12))]
)
def test_the_shorter_side_is_resized_and_the_aspect_ratio_kept(shape, expected):
    assert dataclasses.replace(RAW, size=12)([picture(*shape)]).shape == (1, *expected, 3)


def test_a_crop_has_the_center_and_a_small_image_lies_in_black():
    image = picture(5, 3)
    cropped = dataclasses.replace(RAW, crop_size=(2, 2))([image])
    np.testing.assert_array_equal(cropped[0], image[1:3, :2])
    padded = dataclasses.replace(RAW, crop_size=(2, 6))([image])[0]
    np.testing.assert_array_equal(padded[:, 2:5], image[1:3])  # 3 missing: 2 before, 1 after
    assert not padded[:, :2].any() and not padded[:, 5:].any()


def test_images_of_different_sizes_become_one_batch():
    images = [picture(9, 5), picture(4, 30)]
    process = ImageProcessor(size=8, crop_size=(8, 8))
    batch = process(images)
    assert batch.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(batch[1:], process(images[1:]))
    array = np.stack([picture(4, 4), picture(4, 4, seed=1)])
    np.testing.assert_array_equal(RAW(array), array.astype(np.float32))


VIT = {"image_processor_type": "ViTImageProcessor"}
DEIT = {"image_processor_type": "DeiTImageProcessorFast"}
CONVNEXT = {"image_processor_type": "ConvNextImageProcessor"}
BIG = {"shortest_edge": 400}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (VIT, ImageProcessor()),
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 96}, ImageProcessor((96, 96))),
        (VIT | {"size": [10, 20], "do_convert_rgb": None}, ImageProcessor((10, 20))),
        (
            VIT | {"size": {"height": 4, "width": 6}, "resample": 1},
            ImageProcessor((4, 6), "lanczos"),
        ),
        (VIT | {"size": {"shortest_edge": 30}}, ImageProcessor(30)),
        (VIT | {"size": 30, "default_to_square": False}, ImageProcessor(30)),
        (VIT | {"do_resize": False, "do_rescale": False}, ImageProcessor(None, rescale=None)),
        (VIT | {"do_normalize": False}, ImageProcessor(mean=None, std=None)),
        (VIT | {"do_center_crop": True, "crop_size": 9}, ImageProcessor(crop_size=(9, 9))),
        (DEIT, ImageProcessor((256, 256), "bicubic", (224, 224))),
        (DEIT | {"do_center_crop": False}, ImageProcessor((256, 256), "bicubic")),
        (CONVNEXT | {"size": 224}, ImageProcessor(256, "bicubic", (224, 224))),
        (CONVNEXT | {"size": 9, "crop_pct": 0.9}, ImageProcessor(10, "bicubic", (9, 9))),
        (CONVNEXT, ImageProcessor((384, 384), "bicubic")),
        (CONVNEXT | {"size": BIG}, ImageProcessor((400, 400), "bicubic")),
        (
            VIT | {"image_mean": [0.1, 0.2, 0.3], "image_std": 2, "rescale_factor": 0.5},
            ImageProcessor(rescale=0.5, mean=(0.1, 0.2, 0.3), std=(2, 2, 2)),
        ),
    ],
)
def test_a_configuration_is_read_with_the_defaults_of_its_type(config, expected):
    assert ImageProcessor.from_config(config) == expected


@pytest.mark.parametrize(
    "process",
    [
        ImageProcessor(),
        ImageProcessor(12, "lanczos", (10, 9), 0.5, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)),
        dataclasses.replace(RAW, resample="box"),
    ],
)
def test_a_written_processor_is_read_again(process, tmp_path):
    process.save(tmp_path)
    assert ImageProcessor.from_folder(tmp_path) == process
    content = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert ImageProcessor.from_config(content) == process


def test_a_processor_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    ImageProcessor().save(tmp_path)
    before = (tmp_path / "preprocessor_config.json").read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        ImageProcessor(size=12).save(tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert files == {"preprocessor_config.json": before}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "image_processor_type is None.*ViTImageProcessor, DeiT"),
        ({"image_processor_type": "SamImageProcessor"}, "'SamImageProcessor'"),
        (VIT | {"do_pad": True}, "do_pad is True.*not supported"),
        (VIT | {"size": {"shortest_edge": 3, "longest_edge": 5}}, "size is .*longest_edge"),
        (VIT | {"size": [1, 2, 3]}, r"size is \[1, 2, 3\]"),
        (VIT | {"size": {"height": 0, "width": 4}}, "size is .*'height': 0"),
        (VIT | {"size": True}, "size is True"),
        (VIT | {"do_center_crop": True}, "crop_size is None"),
        (VIT | {"do_center_crop": True, "crop_size": {"shortest_edge": 3}}, "crop_size is .*give"),
        (VIT | {"resample": 7}, "resample is 7; the filters of Pillow"),
        (VIT | {"resample": "bicubic"}, "resample is 'bicubic'"),
        (VIT | {"image_std": [1, 0, 1]}, r"std is \(1, 0, 1\); give three numbers above 0"),
        (VIT | {"image_mean": [0.5]}, r"mean is \(0.5,\); give three numbers"),
        (VIT | {"rescale_factor": "1/255"}, "rescale is '1/255'"),
        (CONVNEXT | {"size": {"height": 4, "width": 4}}, "ConvNext needs a shortest_edge"),
        (CONVNEXT | {"size": 9, "crop_pct": 0}, "crop_pct is 0"),
        (CONVNEXT | {"size": 9, "do_center_crop": True, "crop_size": 5}, "two crops"),
    ],
)
def test_an_option_that_is_not_supported_is_refused_by_name_and_value(config, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor.from_config(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": (3, 0)}, r"size=\(3, 0\)"),
        ({"size": (3, 3, 3)}, r"size is \(3, 3, 3\); give \(height, width\)"),
        ({"crop_size": 3}, "crop_size is 3"),
        ({"resample": "cubic"}, "resample is 'cubic'; choose one of nearest"),
        ({"rescale": float("nan")}, "rescale is nan"),
        ({"mean": None}, "give both"),
        ({"std": (1.0, 1.0, float("inf"))}, "std is"),
        ({"mean": (0.0, 0.0, -1e300)}, "mean is"),
    ],
)
def test_a_wrong_field_is_refused_with_its_value(fields, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor(**fields)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images"),
        (picture(4, 4), r"shape \(4, 3\) and type uint8; give a sequence"),
        ([picture(4, 4)[..., :1]], r"shape \(4, 4, 1\)"),
        ([picture(4, 4)[:0]], r"shape \(0, 4, 3\)"),
        ([picture(4, 4) / 255], "type float64"),
        ([picture(4, 4), picture(5, 4)], r"\(4, 4\) and \(5, 4\); give size"),
    ],
)
def test_something_else_than_images_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        RAW(images)


def test_without_pillow_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert RAW([picture(4, 4)]).shape == (1, 4, 4, 3)
    with pytest.raises(ImportError, match=r"jaxnets\[pictures\]"):
        ImageProcessor(size=(2, 2))([picture(4, 4)])
