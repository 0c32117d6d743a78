"""Sounds of the demo: two after one another, steady or in beats, and what to say of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KINDS = ("tone", "buzz", "noise", "rising chirp", "falling chirp")
PITCHES = {"low": 220.0, "middle": 600.0, "high": 1500.0, "shrill": 3500.0}  # Hz
RHYTHMS = ("steady", "beating")
VOWELS = (400.0, 600.0, 900.0, 1350.0, 2000.0, 3000.0)  # Hz, where a voice is loudest
SECONDS = 2.0
_BEATS = 6.0  # a second

Wave = NDArray[np.float32]


@dataclass(frozen=True)
class Part:
    """One sound: a kind at a pitch."""

    kind: str
    pitch: str

    def __str__(self) -> str:
        return f"{self.pitch} {self.kind}"


@dataclass(frozen=True)
class Clip:
    """What a clip lets hear: two parts that differ."""

    first: Part
    second: Part
    rhythm: str

    @property
    def keywords(self) -> list[str]:
        """Single words for it, sorted."""
        words = {*str(self.first).split(), *str(self.second).split(), self.rhythm}
        return sorted(words)


def all_clips() -> list[Clip]:
    """Every clip there is, 760: no two have the same captions."""
    parts = [Part(*choice) for choice in itertools.product(KINDS, PITCHES)]
    pairs = itertools.permutations(parts, 2)
    return [Clip(*pair, rhythm) for pair in pairs for rhythm in RHYTHMS]


def synthesise(clip: Clip, rate: int, rng: np.random.Generator) -> Wave:
    """The clip's samples, float32 (2 · rate,), between -1 and 1."""
    half = int(SECONDS * rate / 2)
    wave = np.concatenate([_sound(part, half, rate, rng) for part in (clip.first, clip.second)])
    time = np.arange(len(wave)) / rate
    if clip.rhythm == "beating":
        wave = wave * (np.sin(2 * np.pi * _BEATS * time + rng.uniform(0, 2 * np.pi)) > 0)
    wave = wave * rng.uniform(0.2, 0.4) + rng.normal(0, 0.002, len(wave))
    return wave.astype(np.float32)


def _sound(part: Part, length: int, rate: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """`length` samples of one part, about as loud as a full sine."""
    pitch = PITCHES[part.pitch] * rng.uniform(0.95, 1.05)
    time = np.arange(length) / rate
    if part.kind == "noise":
        return _band_of_noise(pitch, length, rate, rng)
    if part.kind.endswith("chirp"):
        ends = (pitch / 1.5, pitch * 1.5)
        start, stop = ends if part.kind == "rising chirp" else ends[::-1]
        seconds = length / rate
        return np.sin(2 * np.pi * (start * time + (stop - start) * time**2 / (2 * seconds)))
    tone = np.sin(2 * np.pi * pitch * time + rng.uniform(0, 2 * np.pi))
    return np.tanh(5 * tone) if part.kind == "buzz" else tone  # odd harmonics


def _band_of_noise(
    pitch: float, length: int, rate: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    spectrum = np.fft.rfft(rng.normal(0, 1, length))
    frequencies = np.fft.rfftfreq(length, 1 / rate)
    spectrum[(frequencies < pitch / 1.4) | (frequencies > pitch * 1.4)] = 0
    wave = np.fft.irfft(spectrum, length)
    return wave / max(1e-9, np.abs(wave).max())


def voice(pitch: float, vowel: float, rate: int, seconds: float, rng: np.random.Generator) -> Wave:
    """Something like a vowel: harmonics of `pitch` Hz, loudest near `vowel` Hz, with a tremble."""
    time = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * pitch * rng.uniform(0.97, 1.03) * time + 0.3 * np.sin(2 * np.pi * 5 * time)
    harmonics = range(1, int(4000 / pitch) + 1)
    octaves = [np.log2(number * pitch / vowel) for number in harmonics]
    parts = [
        (1 / number + 2 * np.exp(-((octave / 0.4) ** 2))) * np.sin(number * phase)
        for number, octave in zip(harmonics, octaves, strict=True)
    ]
    wave = np.sum(parts, axis=0)
    wave = 0.1 * wave / wave.std() + rng.normal(0, 0.003, len(time))
    return wave.astype(np.float32)


def captions(clip: Clip) -> list[str]:
    """Five captions, each of which names both parts, their order and the rhythm."""
    first, second, rhythm = clip.first, clip.second, clip.rhythm
    return [
        f"a {first} and then a {second}, {rhythm}",
        f"A {rhythm} {first} is followed by a {second}.",
        f"First a {first} sounds, then a {second}; it is {rhythm}.",
        f"{rhythm} sounds: a {first}, after it a {second}",
        f"Before a {second} there is a {first}, both {rhythm}.",
    ]
