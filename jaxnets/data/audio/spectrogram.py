"""Spectrograms: framing, short-time Fourier transform, mel filters, log-mel features, MFCC.

Frames, windows and filters follow librosa and torchaudio: a periodic Hann window centered in each
frame, frame t centered on sample t hop, zero padding at both ends (`pad_mode="constant"`), or the
signal reflected at both ends (`pad_mode="reflect"`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.core import at_least_int32
from jaxnets.data.audio.waveform import to_waveform
from jaxnets.functional.lengths import clear_padding

Scale = Literal["htk", "slaney"]
PadMode = Literal["constant", "reflect"]

# Slaney's scale: linear up to 1 kHz (mel 15), then 27 steps for each factor of 6.4.
_LINEAR_HERTZ_PER_MEL = 200 / 3
_BREAK_HERTZ, _BREAK_MEL = 1000.0, 15.0
_LOG_STEP = np.log(6.4) / 27


def frame(
    samples: jax.Array,
    frame_length: int,
    hop: int,
    *,
    center: bool = True,
    pad_mode: PadMode = "constant",
) -> jax.Array:
    """Split a signal into overlapping frames.

    Args:
        samples: [..., time].
        frame_length: samples per frame.
        hop: samples from the start of one frame to the next.
        center: center frame t on sample t * hop, with padding at both ends; else frame t starts at
            sample t * hop, and only complete frames are returned.
        pad_mode: of a centered frame beyond the ends: "constant" is 0, "reflect" the signal
            mirrored at its first and last sample.

    Returns:
        [..., frames, frame_length]; 1 + time // hop frames if centered (none for an empty
        signal), else 1 + (time - frame_length) // hop.

    Raises:
        ValueError: a frame length or hop below 1, an unknown `pad_mode`, or a signal that is too
            short to be reflected.

    Example:
        >>> frame(jnp.arange(1, 6), 4, 2).tolist()
        [[0, 0, 1, 2], [1, 2, 3, 4], [3, 4, 5, 0]]
        >>> frame(jnp.arange(1, 6), 4, 2, pad_mode="reflect").tolist()
        [[3, 2, 1, 2], [1, 2, 3, 4], [3, 4, 5, 4]]
    """
    if frame_length < 1 or hop < 1:
        raise ValueError(f"frame length {frame_length} and hop {hop} must be at least 1")
    if pad_mode not in ("constant", "reflect"):
        raise ValueError(f"pad_mode is {pad_mode!r}; choose 'constant' or 'reflect'")
    time, ends = samples.shape[-1], [(0, 0)] * (samples.ndim - 1)
    before = frame_length // 2 if center else 0
    num_frames = num_valid_frames(time, frame_length, hop, center=center)
    if center and pad_mode == "reflect":
        after = frame_length - before
        if time <= after:
            raise ValueError(
                f"a signal of {time} samples is too short to be reflected at its ends in frames of "
                f"{frame_length}; pad it to {after + 1} samples or more"
            )
        samples = jnp.pad(samples, [*ends, (before, after)], mode="reflect")
        before = 0
    # Concatenate shifted views of blocks of `hop` samples, which needs no gather.
    num_blocks = -(-frame_length // hop)
    needed = (num_frames + num_blocks - 1) * hop
    behind = max(0, needed - before - samples.shape[-1])
    padded = jnp.pad(samples, [*ends, (before, behind)])[..., :needed]
    blocks = padded.reshape(*samples.shape[:-1], -1, hop)  # [..., blocks, hop]
    shifted = [blocks[..., i : i + num_frames, :] for i in range(num_blocks)]
    return jnp.concatenate(shifted, axis=-1)[..., :frame_length]


def num_valid_frames(lengths: Any, frame_length: int, hop: int, *, center: bool = True) -> Any:
    """Return the number of frames of signals.

    Args:
        lengths: number of samples, an integer or an integer array [...].
        frame_length: samples per frame.
        hop: samples from the start of one frame to the next.
        center: as in `frame`.

    Returns:
        The frames that `frame` returns for each length: an integer, or an integer array [...] of
        32 bits or more.

    Example:
        >>> num_valid_frames(8000, 256, 80), num_valid_frames(8000, 256, 80, center=False)
        (101, 97)
    """
    lengths = at_least_int32(lengths)
    first, offset = (1, 0) if center else (frame_length, frame_length)
    return (lengths >= first) * (1 + (lengths - offset) // hop)


def stft(
    samples: jax.Array,
    *,
    frame_length: int,
    hop: int,
    fft_length: int | None = None,
    center: bool = True,
    pad_mode: PadMode = "constant",
) -> jax.Array:
    """Compute the short-time Fourier transform with a Hann window.

    `X[t, k] = sum_n window[n] x[t hop + n - fft_length / 2] exp(-2 pi i k n / fft_length)`

    Corresponds to `librosa.stft` and `torch.stft(return_complex=True)` with a Hann window,
    transposed to [frames, bins]; the options are `win_length`, `hop_length`, `n_fft`, `center` and
    `pad_mode` there, whose default in torch is "reflect".

    Uses a real FFT, which is faster on CPU: log-mel features of 64 x 1 s at 8 kHz in frames of 256
    take one half to two thirds of the time of a matrix product with the Fourier matrix.

    Args:
        samples: floating [..., time].
        frame_length: length of the window in samples.
        hop: samples from one frame to the next.
        fft_length: even, default `frame_length`; the window is centered and zero-padded to it.
        center: as in `frame`, for frames of `fft_length`.
        pad_mode: as in `frame`.

    Returns:
        Complex [..., frames, fft_length // 2 + 1].

    Raises:
        ValueError: an odd `fft_length` or one below `frame_length`, or as in `frame`.

    Example:
        A tone of 1 kHz at 8 kHz lies in bin 1000 / 8000 * 256 = 32.

        >>> tone = jnp.sin(2 * jnp.pi * 1000 * jnp.arange(8000) / 8000)
        >>> spectrum = stft(tone, frame_length=256, hop=128)
        >>> spectrum.shape, int(jnp.abs(spectrum[5]).argmax())
        ((63, 129), 32)
    """
    fft_length = frame_length if fft_length is None else fft_length
    if fft_length % 2 or fft_length < frame_length:
        raise ValueError(
            f"FFT length {fft_length} must be even and at least the frame length {frame_length}; "
            f"give for example {_power_of_two(frame_length)}"
        )
    frames = frame(samples, fft_length, hop, center=center, pad_mode=pad_mode)
    padded = np.zeros(fft_length)
    start = (fft_length - frame_length) // 2
    padded[start : start + frame_length] = np.hanning(frame_length + 1)[:-1]  # periodic
    # [1, ..., 1, fft_length]
    window = jnp.asarray(padded, frames.dtype).reshape((1,) * (frames.ndim - 1) + (-1,))
    return jnp.fft.rfft(frames * window)  # [..., frames, bins]


def mel_filterbank(
    num_mels: int,
    num_bins: int,
    sample_rate: int,
    low: float = 0.0,
    high: float | None = None,
    *,
    scale: Scale = "slaney",
    norm: Literal["slaney"] | None = "slaney",
) -> np.ndarray:
    """Compute triangular filters whose centers are equally spaced on the mel scale.

    Equals `librosa.filters.mel` transposed (`htk=True` is scale "htk" here) and
    `torchaudio.functional.melscale_fbanks`, whose defaults are `mel_scale="htk"` and `norm=None`.

    Args:
        num_mels: number of filters.
        num_bins: frequency bins, fft_length // 2 + 1.
        sample_rate: in hertz.
        low: lower edge of the first filter in hertz, `fmin` in librosa.
        high: upper edge of the last filter in hertz, `fmax`; by default half the sample rate.
        scale: "htk": `2595 log10(1 + f / 700)`; "slaney": linear below 1 kHz, logarithmic above.
        norm: "slaney": every filter has area 1 over frequency in hertz; None: height 1.

    Returns:
        float32 [num_bins, num_mels].

    Raises:
        ValueError: an unknown scale or norm, a frequency range outside [0, sample_rate / 2], or
            a filter too narrow to cover a bin.

    Example:
        >>> mel_filterbank(40, 129, 8000).shape
        (129, 40)

    References:
        Stevens, Volkmann and Newman 1937 (the scale); Young et al. 2002, The HTK Book, section
        5.4; Slaney 1998, Auditory Toolbox, Interval Technical Report 1998-010.
    """
    high = sample_rate / 2 if high is None else high
    if scale not in ("htk", "slaney") or norm not in ("slaney", None):
        raise ValueError(
            f"scale {scale!r} and norm {norm!r} are not known; use scale 'htk' or 'slaney' and "
            "norm 'slaney' or None"
        )
    if not 0 <= low < high <= sample_rate / 2 or num_mels < 1 or num_bins < 2:
        raise ValueError(
            f"{num_mels} filters from {low} to {high} Hz on {num_bins} bins do not fit the sample "
            f"rate {sample_rate}; give 0 <= low < high <= {sample_rate / 2}"
        )
    edges = _to_hertz(np.linspace(_to_mel(low, scale), _to_mel(high, scale), num_mels + 2), scale)
    # All below: [bins, mels].
    bins = np.linspace(0, sample_rate / 2, num_bins)[:, None]
    left, center, right = edges[None, :-2], edges[None, 1:-1], edges[None, 2:]
    rising, falling = (bins - left) / (center - left), (right - bins) / (right - center)
    filters = np.maximum(0, np.minimum(rising, falling))
    empty = np.flatnonzero(~filters.any(axis=0))
    if empty.size:
        raise ValueError(
            f"mel filter {empty[0]} ({edges[empty[0]]:.0f} to {edges[empty[0] + 2]:.0f} Hz) "
            f"covers no bin: {num_mels} filters are too many for {num_bins} bins; use fewer or a "
            "longer FFT"
        )
    return (filters if norm is None else filters * 2 / (right - left)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LogMel:
    """Log-mel features: `log max(floor, filters^T |stft|^2)`, in nats.

    Call it inside the compiled step; it is hashable and compares by value.

    Corresponds to the logarithm of `librosa.feature.melspectrogram` (same filters and padding) and
    of `torchaudio.transforms.MelSpectrogram(pad_mode="constant")`, whose filters are `scale="htk"`
    and `norm=None` here. The options are `win_length`, `hop_length`, `n_fft`, `n_mels`, `fmin` and
    `fmax` in librosa (`f_min`, `f_max` in torchaudio), with other defaults; features are
    [frames, mels], not [mels, frames]. On a voice-like signal of 1 s the features are within 1e-4
    of librosa's and, with 20 filters of height 1 on the HTK scale, within 5e-4 of torchaudio's
    (tests/parity/test_audio.py).

    Attributes:
        sample_rate: in hertz.
        frame_length: length of the window in samples; by default 25 ms.
        hop: samples from one frame to the next; by default 10 ms.
        fft_length: by default the next power of two from `frame_length`.
        num_mels: number of features.
        low: lowest frequency in hertz.
        high: highest frequency in hertz; by default half the sample rate.
        scale: of the filters, as in `mel_filterbank`.
        norm: of the filters, as in `mel_filterbank`.
        floor: minimum power; 1e-6 is below speech at any usual level and limits the contrast to
            digital silence.
        center: as in `frame`.
        pad_mode: as in `frame`; "reflect" does not go with lengths.

    Raises:
        ValueError: a number out of range; see `stft` and `mel_filterbank`.

    Example:
        >>> log_mel = LogMel(8000)
        >>> samples, lengths = jnp.zeros((2, 8000), jnp.int16), jnp.array([8000, 4000])
        >>> log_mel(samples, lengths).shape, log_mel.frames(lengths).tolist()
        ((2, 101, 40), [101, 51])

    References:
        Davis and Mermelstein 1980, IEEE Transactions on Acoustics, Speech and Signal Processing
        28(4), section II.
    """

    sample_rate: int
    frame_length: int | None = None
    hop: int | None = None
    fft_length: int | None = None
    num_mels: int = 40
    low: float = 0.0
    high: float | None = None
    scale: Scale = "slaney"
    norm: Literal["slaney"] | None = "slaney"
    floor: float = 1e-6
    center: bool = True
    pad_mode: PadMode = "constant"

    def __call__(self, samples: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """Map a batch of signals to features, the logarithm of the power in nats.

        Args:
            samples: int16 or floating, [batch, time].
            lengths: integer [batch], samples of each signal; by default all samples count. Samples
                after them are ignored, frames from `frames(lengths)` on are 0, and the others
                equal those of the unpadded signal.

        Returns:
            [batch, frames, num_mels].

        Raises:
            ValueError: samples or lengths that do not fit, or lengths with pad_mode="reflect".
        """
        samples = to_waveform(samples)
        if samples.ndim != 2:
            raise ValueError(f"samples have shape {samples.shape}; give [batch, time]")
        if self.pad_mode == "reflect" and lengths is not None:
            raise ValueError(
                "pad_mode='reflect' reflects the end of the array, not that of each signal; leave "
                "the lengths out, or choose 'constant'"
            )
        samples, _ = clear_padding(samples, lengths)
        frame_length, hop, fft_length = self._sizes
        spectrum = stft(
            samples,
            frame_length=frame_length,
            hop=hop,
            fft_length=fft_length,
            center=self.center,
            pad_mode=self.pad_mode,
        )
        power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)  # [batch, frames, bins]
        filters = jnp.asarray(self.filters(), power.dtype)
        mels = jnp.matmul(power, filters, precision="highest")
        features = jnp.log(jnp.where(mels < self.floor, self.floor, mels))  # NaN stays NaN
        if lengths is None:
            return features
        num_frames = features.shape[1]
        lengths = at_least_int32(jnp.asarray(lengths))
        # `clear_padding` has made signals of negative length NaN; do not mask these frames.
        num_valid = jnp.where(lengths < 0, num_frames, self.frames(lengths))
        valid = jnp.arange(num_frames)[None] < num_valid[:, None]
        return jnp.where(valid[..., None], features, jnp.zeros((), features.dtype))

    def frames(self, lengths: Any) -> Any:
        """Return the number of frames of signals of `lengths` samples, an integer or an array."""
        _, hop, fft_length = self._sizes
        return num_valid_frames(lengths, fft_length, hop, center=self.center)

    def filters(self) -> np.ndarray:
        """Compute the mel filters.

        Returns:
            [bins, num_mels], of the FFT's bins from 0 Hz to half the sample rate.
        """
        num_bins = self._sizes[2] // 2 + 1
        band = (self.sample_rate, self.low, self.high)
        return mel_filterbank(self.num_mels, num_bins, *band, scale=self.scale, norm=self.norm)

    def __post_init__(self) -> None:
        if not self.floor > 0:
            raise ValueError(f"floor {self.floor} is not positive; give for example 1e-6")
        jax.eval_shape(self, jax.ShapeDtypeStruct((1, self._sizes[2]), jnp.float32))

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Frame length, hop and FFT length."""
        frame_length = (
            round(self.sample_rate / 40) if self.frame_length is None else self.frame_length
        )
        hop = round(self.sample_rate / 100) if self.hop is None else self.hop
        fft_length = _power_of_two(frame_length) if self.fft_length is None else self.fft_length
        return frame_length, hop, fft_length


def mfcc(log_mels: jax.Array, num_coefficients: int = 13) -> jax.Array:
    """Compute mel-frequency cepstral coefficients, the orthonormal DCT-II of log-mel features.

    `c[k] = s[k] sum_m x[m] cos(pi k (m + 1/2) / M)` with s such that the transform is orthonormal.

    Corresponds to `librosa.feature.mfcc(S=log_mels, n_mfcc=13)` and, with `log_mels=True`, to
    `torchaudio.transforms.MFCC`; by default both take decibels instead of natural logarithms. On
    the features of a voice-like signal 13 coefficients are within 2e-4 of librosa's for the same
    logarithms, and within 2e-3 of torchaudio's, which adds 1e-6 to the power where `LogMel` takes
    the maximum (tests/parity/test_audio.py).

    Args:
        log_mels: floating [..., num_mels], from `LogMel`.
        num_coefficients: number of leading coefficients to return, at most num_mels.

    Returns:
        [..., num_coefficients].

    Raises:
        ValueError: more coefficients than features, or none.

    Example:
        >>> mfcc(jnp.ones((2, 7, 40))).shape
        (2, 7, 13)

    References:
        Davis and Mermelstein 1980, IEEE Transactions on Acoustics, Speech and Signal Processing
        28(4), section II. Decibels are 4.34 times the natural logarithms.
    """
    num_mels = log_mels.shape[-1]
    if not 1 <= num_coefficients <= num_mels:
        raise ValueError(
            f"cannot take {num_coefficients} coefficients of {num_mels} features; give a number "
            f"in [1, {num_mels}]"
        )
    positions = np.arange(num_mels)[:, None] + 0.5
    basis = np.cos(np.pi / num_mels * positions * np.arange(num_coefficients)[None])
    basis *= np.sqrt(2 / num_mels)
    basis[:, 0] /= np.sqrt(2)
    return jnp.matmul(log_mels, jnp.asarray(basis, log_mels.dtype), precision="highest")


def standardize(features: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Normalize each feature of each example to mean 0 and variance 1 over its frames.

    This is cepstral mean and variance normalization (CMVN): it removes the level of a recording
    and the frequency response of its microphone.

    Args:
        features: floating [batch, frames, channels].
        lengths: valid frames of each example, integer [batch]; default all.

    Returns:
        The shape and dtype of `features`, 0 from each length on.

    Raises:
        ValueError: lengths that do not fit, as in `clear_padding`.

    Example:
        >>> features = jnp.array([[[1.0], [3.0], [9.0]]])
        >>> standardize(features, jnp.array([2])).ravel().round(3).tolist()
        [-1.0, 1.0, 0.0]

    References:
        Viikki and Laurila 1998, Speech Communication 25 (cepstral mean and variance
        normalization).
    """
    features, valid = clear_padding(features, lengths)
    valid = valid[..., None]
    count = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1).astype(features.dtype)
    mean = jnp.sum(features, axis=1, keepdims=True) / count
    centered = jnp.where(valid, features - mean, jnp.zeros((), features.dtype))
    variance = jnp.sum(jnp.square(centered), axis=1, keepdims=True) / count
    return centered * jax.lax.rsqrt(variance + 1e-5)


def _power_of_two(least: int) -> int:
    return 1 << max(1, (least - 1).bit_length())


def _to_mel(hertz: float, scale: Scale) -> float:
    if scale == "htk":
        return 2595 * np.log10(1 + hertz / 700)
    if hertz < _BREAK_HERTZ:
        return hertz / _LINEAR_HERTZ_PER_MEL
    return _BREAK_MEL + np.log(hertz / _BREAK_HERTZ) / _LOG_STEP


def _to_hertz(mels: np.ndarray, scale: Scale) -> np.ndarray:
    if scale == "htk":
        return 700 * (10 ** (mels / 2595) - 1)
    logarithmic = _BREAK_HERTZ * np.exp(_LOG_STEP * (mels - _BREAK_MEL))
    return np.where(mels < _BREAK_MEL, mels * _LINEAR_HERTZ_PER_MEL, logarithmic)
