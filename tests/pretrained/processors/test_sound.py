"""Sounds to features: batches, files of options, and what is refused."""

import json

import numpy as np
import pytest

from jaxnets.data import WhisperFeatures
from jaxnets.pretrained import SoundProcessor

FEATURES = WhisperFeatures(seconds=1)
PROCESSOR = SoundProcessor(FEATURES)


def sounds(*lengths):
    rng = np.random.default_rng(0)
    return [rng.normal(size=length).astype(np.float32) / 10 for length in lengths]


def test_a_batch_has_the_features_of_each_sound():
    batch = sounds(16_000, 5000, 0)
    (name,) = found = PROCESSOR(batch, sample_rate=16_000)
    assert name == "inputs" and found[name].shape == (3, 100, 80)
    for row, sound in zip(found[name], batch, strict=True):
        padded = np.pad(sound, (0, 16_000 - len(sound)))
        np.testing.assert_allclose(row, FEATURES(padded[None])[0], atol=1e-5)


def test_sixteen_bit_sounds_are_scaled():
    (sound,) = sounds(4000)
    whole = np.round(sound * 32768).astype(np.int16)
    found = PROCESSOR([whole, whole / np.float32(32768)])["inputs"]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


@pytest.mark.parametrize("unified", [False, True], ids=["own_file", "processor_config"])
def test_options_are_those_of_the_folder(tmp_path, unified):
    processor = SoundProcessor(WhisperFeatures(128, hop=200, fft_length=512, seconds=5))
    processor.save(tmp_path)
    if unified:
        content = json.loads((tmp_path / "preprocessor_config.json").read_text())
        (tmp_path / "preprocessor_config.json").unlink()
        file = tmp_path / "processor_config.json"
        file.write_text(json.dumps({"feature_extractor": content}))
    assert SoundProcessor.from_folder(tmp_path) == processor


def test_options_that_a_file_does_not_name_are_those_of_whisper(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert SoundProcessor.from_folder(tmp_path) == SoundProcessor(WhisperFeatures())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"feature_extractor_type": "ClapFeatureExtractor"}, "ClapFeatureExtractor"),
        ({"dither": 0.1}, "dither, 0.1, is not supported"),
        ({"padding_value": 1.0}, "padding_value, 1.0"),
        ({"do_normalize": True}, "do_normalize, true"),
        ({"feature_size": "80"}, 'feature_size, "80", is no integer'),
        ({"hop_length": 0}, "hop_length, 0"),
        ({"sampling_rate": 8000}, "features do not exist: .* 8000"),
        ({"n_fft": 401}, "FFT length 401"),
    ],
)
def test_an_option_that_is_not_supported_is_refused_by_name_and_value(tmp_path, entries, message):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=message) as error:
        SoundProcessor.from_folder(tmp_path)
    assert str(file) in str(error.value)


def test_a_folder_without_options_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        SoundProcessor.from_folder(tmp_path)
    (tmp_path / "processor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="feature_extractor"):
        SoundProcessor.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: PROCESSOR([]), "no sounds"),
        (lambda: PROCESSOR(sounds(17_000)), "1.06 s is longer than the 1 s"),
        (lambda: PROCESSOR([np.zeros((2, 100), "f")]), r"shape \(2, 100\)"),
        (lambda: PROCESSOR(sounds(100), sample_rate=44_100), "44100 Hz for features of 16000 Hz"),
        (lambda: PROCESSOR([np.zeros(100, np.int32)]), "int32"),
    ],
)
def test_wrong_sounds_are_refused_with_their_values(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_a_tokenizer_in_the_folder_is_kept(tmp_path):
    pytest.importorskip("tokenizers")
    PROCESSOR.save(tmp_path)
    assert SoundProcessor.from_folder(tmp_path).tokenizer is None
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    processor = SoundProcessor.from_folder(tmp_path)
    assert processor.tokenizer.decode([5, 6, 7]) == "a good film"
    processor.save(tmp_path / "again")
    assert SoundProcessor.from_folder(tmp_path / "again") == processor
