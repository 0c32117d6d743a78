"""Sound files as log-mel features: what Whisper's feature extractor gives, to the last bit.

    waveform = read_waveform(path, start=2.5, seconds=10.0)   # float32 (160000,), 16 kHz mono
    features = log_mel(waveform)                              # float32 (1000, 80)

wav, flac, ogg and mp3 are read by libsndfile, and resampled by soxr. torchaudio is not needed, and
must not be there in a version that does not import: transformers then breaks.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.files import check_regular

log = logging.getLogger(__name__)

SAMPLE_RATE = 16_000  # Hz
NUM_MELS = 80
HOP = 160  # samples from one frame to the next: 100 frames a second
FRAMES_PER_SECOND = SAMPLE_RATE // HOP
_WINDOW = 400  # samples, 25 ms
_BLOCK = 1 << 22  # samples that are read at a time
_CANCELLED = 1e-3  # of a channel's power: less than this in the mean is no sound any more


class AudioError(ValueError):
    """A file that gives no sound; the message names it."""


def length_of(path: Path) -> float:
    """Seconds of sound that the file's header names. Raises AudioError for what is no sound."""
    with _opened(path) as sound:
        return sound.frames / sound.samplerate


def read_waveform(path: Path, start: float = 0.0, seconds: float | None = None) -> Tensor:
    """The sound as float32 (N,), 16 kHz, channels averaged (of opposite ones the loudest).

    start, seconds: the part that is read; default: all of it. A part beyond the end is shorter,
    also of a file that was cut and whose header promises more.
    Raises AudioError, which names the file, for one that cannot be read or holds no sound.
    """
    with _opened(path) as sound:
        rate = sound.samplerate
        first = min(round(start * rate), sound.frames)
        wanted = -1 if seconds is None else round(seconds * rate)
        try:
            sound.seek(first)
            samples = _samples(sound, wanted)
        except RuntimeError as error:
            raise AudioError(f"{path}: the sound is damaged ({error})") from None
    if len(samples) == 0 and first == 0:
        raise AudioError(f"{path}: the file holds no sound")
    if not np.isfinite(samples).all():
        raise AudioError(f"{path}: the sound holds values that are no numbers")
    return torch.from_numpy(_resampled(_mixed(samples), rate))


def _mixed(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, channels) as (N,): the mean, or the loudest where the mean cancels what they hold."""
    mean = samples.mean(axis=1)
    if samples.shape[1] == 1 or not len(samples):
        return mean
    powers = np.square(samples, dtype=np.float64).mean(axis=0)
    if np.square(mean, dtype=np.float64).mean() < _CANCELLED * powers.max():
        return np.ascontiguousarray(samples[:, powers.argmax()])
    return mean


def _samples(sound: Any, wanted: int) -> NDArray[np.float32]:
    """The next `wanted` samples, or all, as (N, channels): a block at a time, for a damaged header
    promises more than memory holds.
    """
    blocks, left = [], sound.frames if wanted < 0 else wanted
    while left > 0:
        block = sound.read(min(left, _BLOCK), dtype="float32", always_2d=True)
        if len(block) == 0:
            break
        blocks.append(block)
        left -= len(block)
    if len(blocks) == 1:
        return blocks[0]
    return np.concatenate(blocks) if blocks else np.empty((0, sound.channels), np.float32)


def log_mel(waveform: Tensor) -> Tensor:
    """Log-mel features (T, 80) of a waveform (N,) at 16 kHz, T = N // 160; about -1 to 2.

    Equal, bit for bit, to transformers' WhisperFeatureExtractor(feature_size=80) for the same
    samples without padding. The floor, 80 dB below the loudest, is each clip's own: the features do
    not depend on what else is in a batch. Less than 25 ms are filled up with silence.
    """
    if len(waveform) < _WINDOW:  # the ends are mirrored, half a window of them
        waveform = torch.nn.functional.pad(waveform, (0, _WINDOW - len(waveform)))
    half = _WINDOW // 2
    before, after = waveform[1 : half + 1].flip(0), waveform[-half - 1 : -1].flip(0)
    mirrored = torch.cat((before, waveform, after))
    frames = mirrored.as_strided((len(waveform) // HOP, _WINDOW), (HOP, 1))
    spectrum = torch.fft.rfft(frames * _window())
    # twice as fast as abs() of the complex numbers, with the same bits
    real, imaginary = spectrum.real.contiguous(), spectrum.imag.contiguous()
    power = torch.hypot(real, imaginary, out=real).square_()
    mel = (_filters() @ power.T).clamp_(min=1e-10).log10_()
    return torch.maximum(mel, mel.max() - 8.0, out=mel).add_(4.0).div_(4.0).T


class FeatureCache:
    """Whole clips' features on the disk, float16: 16 kB a second of sound.

    A file is known by its path, size and time; features of one that has changed are made anew.
    What comes back is rounded to float16 from the first time on, so that the numbers do not depend
    on whether the cache was warm.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = Path(directory)

    def features(self, path: Path) -> Tensor:
        """log_mel of the whole file, float32 (T, 80). Raises AudioError as read_waveform does."""
        stored = self._place(path)
        try:
            check_regular(stored)
            found = np.load(stored, allow_pickle=False)
            if found.dtype == np.float16 and found.shape[1:] == (NUM_MELS,):
                return torch.from_numpy(found).float()
        except Exception:  # not there yet, or damaged, which shows in any of a dozen ways
            log.debug("%s is made", stored)
        features = log_mel(read_waveform(path)).half()
        _save(stored, features.numpy())
        return features.float()

    def _place(self, path: Path) -> Path:
        try:
            status = path.stat()
        except OSError as error:
            raise AudioError(f"{path}: {error.strerror}") from None
        name = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
        digest = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
        return self._directory / digest[:2] / f"{digest}.npy"


def _save(path: Path, features: NDArray[np.float16]) -> None:
    from shared.files import write_atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda stream: np.save(stream, features, allow_pickle=False), durable=False)


def _opened(path: Path) -> Any:
    """The file as libsndfile's, at its beginning."""
    import soundfile

    if path.suffix.lower() in (".m4a", ".aac", ".mp4"):
        raise AudioError(f"{path}: m4a is not read; ffmpeg -i IN.m4a -ac 1 -ar 16000 OUT.wav")
    if not path.is_file():
        raise AudioError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: the file is empty")
    try:
        return soundfile.SoundFile(path)
    except RuntimeError as error:  # LibsndfileError is one
        raise AudioError(f"{path}: no readable sound ({_reason(error)})") from None


def _reason(error: RuntimeError) -> str:
    return str(getattr(error, "error_string", error)).strip().rstrip(".")


def _resampled(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    if rate == SAMPLE_RATE or not len(samples):
        return samples
    import soxr

    return soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")


@functools.cache
def _window() -> Tensor:
    return torch.hann_window(_WINDOW)


@functools.cache
def _filters() -> Tensor:
    """Triangles on Slaney's mel scale, each of area one: (80, 201).

    Laid out as a transposed matrix, as in Whisper's extractor: the product then adds up in the same
    order, and gives the same bits.
    """
    edges = _mel_to_hertz(np.linspace(_hertz_to_mel(0.0), _hertz_to_mel(8000.0), NUM_MELS + 2))
    bins = np.linspace(0, SAMPLE_RATE // 2, _WINDOW // 2 + 1)
    slopes = edges[None, :] - bins[:, None]
    widths = np.diff(edges)
    rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    triangles = np.maximum(0, np.minimum(rising, falling))
    triangles *= (2.0 / (edges[2:] - edges[:-2]))[None, :]
    return torch.from_numpy(triangles).float().T


def _hertz_to_mel(hertz: float) -> float:
    """Slaney's scale: even up to 1 kHz, 15 mels there; then 27 mels for a factor of 6.4."""
    if hertz < 1000.0:
        return 3.0 * hertz / 200.0
    return 15.0 + math.log(hertz / 1000.0) * (27.0 / math.log(6.4))


def _mel_to_hertz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    above = 1000.0 * np.exp((math.log(6.4) / 27.0) * (mels - 15.0))
    return np.where(mels < 15.0, 200.0 * mels / 3.0, above)
