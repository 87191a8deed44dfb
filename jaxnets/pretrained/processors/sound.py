"""Sounds to batches of features, as a pretrained network was trained with."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.data.audio import WhisperFeatures, to_waveform
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.processors.text import TextProcessor, read_text_processor
from jaxnets.storage import atomic_file

#: `feature_extractor_type` of the features.
WHISPER = "WhisperFeatureExtractor"
_FILE, _UNIFIED = "preprocessor_config.json", "processor_config.json"
_FIELDS = {
    "num_mels": ("feature_size", 80),
    "sample_rate": ("sampling_rate", 16_000),
    "hop": ("hop_length", 160),
    "fft_length": ("n_fft", 400),
    "seconds": ("chunk_length", 30),
}


@dataclasses.dataclass(frozen=True)
class SoundProcessor:
    """The features that a network of sounds takes, and the tokens of its texts.

    Corresponds to `WhisperFeatureExtractor` of transformers. Differs from it: a sound that is too
    long is refused, not cut.

    Attributes:
        features: of a padded batch.
        tokenizer: of the texts; None without one.

    Example:
        >>> processor = SoundProcessor(WhisperFeatures(seconds=1))
        >>> batch = processor([np.zeros(8000, np.float32), np.zeros(500, np.int16)])
        >>> batch["inputs"].shape
        (2, 100, 80)
    """

    features: WhisperFeatures
    tokenizer: TextProcessor | None = None

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> SoundProcessor:
        """Read the options of a Hugging Face folder.

        Args:
            path: a folder with preprocessor_config.json, or with processor_config.json, where
                transformers 5 writes them. It may have a tokenizer too.

        Raises:
            FileNotFoundError: it has neither.
            ValueError: damaged, or of another kind of features; the message names the file.
        """
        path = Path(path)
        if (path / _FILE).exists() or not (path / _UNIFIED).exists():
            config = Config.read(path / _FILE)
        else:
            unified = Config.read(path / _UNIFIED)
            inside = unified.inside("feature_extractor")
            if inside is None:
                raise unified.error("feature_extractor", "is missing")
            config = inside
        config.require(
            feature_extractor_type=WHISPER,
            dither=0.0,
            padding_value=0.0,
            do_normalize=False,
        )
        fields = {ours: config.integer(*theirs) for ours, theirs in _FIELDS.items()}
        try:
            features = WhisperFeatures(**fields)
        except ValueError as error:
            raise config.document.error(f"its features do not exist: {error}") from error
        return cls(features, read_text_processor(path))

    def __call__(
        self, waveforms: Sequence[np.ndarray], *, sample_rate: int | None = None
    ) -> dict[str, jax.Array]:
        """Compute the features of sounds as one batch.

        Args:
            waveforms: int16, or floats in [-1, 1], [time] each.
            sample_rate: in hertz; None takes them to have the right one.

        Returns:
            {"inputs": [batch, frames, num_mels]}.

        Raises:
            ValueError: no sounds, one that is too long or has another shape, or another sample
                rate.
        """
        own = self.features.sample_rate
        if sample_rate is not None and sample_rate != own:
            raise ValueError(
                f"sounds of {sample_rate} Hz for features of {own} Hz; convert them by `resample`"
            )
        if not len(waveforms):
            raise ValueError("there are no sounds; give at least 1")
        size = self.features.seconds * own
        samples = np.zeros((len(waveforms), size), np.float32)
        for row, waveform in zip(samples, waveforms, strict=True):
            sound = np.asarray(to_waveform(jnp.asarray(waveform)))
            if sound.ndim != 1:
                raise ValueError(
                    f"a sound has shape {sound.shape}; give [time], one channel, for each"
                )
            if sound.size > size:
                raise ValueError(
                    f"a sound of {sound.size / own:.2f} s is longer than the "
                    f"{self.features.seconds} s of the features; cut it into windows"
                )
            row[: sound.size] = sound
        return {"inputs": _compute(self.features, samples)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write preprocessor_config.json and the tokenizer, which `transformers` reads too.

        Args:
            path: the folder; it is created if it is missing, an existing file is replaced.
        """
        features = self.features
        content: dict[str, Any] = {
            "feature_extractor_type": WHISPER,
            **{theirs: getattr(features, ours) for ours, (theirs, _) in _FIELDS.items()},
            "n_samples": features.seconds * features.sample_rate,
            "nb_max_frames": features.seconds * features.sample_rate // features.hop,
            "padding_side": "right",
            "padding_value": 0.0,
            "dither": 0.0,
            "return_attention_mask": False,
        }
        with atomic_file(Path(path) / _FILE) as stream:
            stream.write(json.dumps(content, indent=2).encode() + b"\n")
        if self.tokenizer is not None:
            self.tokenizer.save(path)


@functools.partial(jax.jit, static_argnums=0)
def _compute(features: WhisperFeatures, samples: jax.Array) -> jax.Array:
    return features(samples)
