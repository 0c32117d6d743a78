"""Sound files as features: equal to Whisper's extractor, in every format, broken files named."""

import numpy as np
import pytest
import soundfile
import torch

from multimodal.pairs import audio, samples
from multimodal.pairs.audio import AudioError, FeatureCache, log_mel, read_waveform

RATE = audio.SAMPLE_RATE


def tone(seconds=1.0, rate=RATE, pitch=440.0):
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)).astype("f4")


def pitch_of(waveform):
    spectrum = np.abs(np.fft.rfft(waveform.numpy() * np.hanning(len(waveform))))
    return spectrum.argmax() * RATE / len(waveform)


def by_whisper(extractor, waveform):
    """Its torch path on the real length: no padding, no cut."""
    found = extractor(
        waveform.numpy(), sampling_rate=RATE, padding=False, truncation=False, return_tensors="pt"
    )
    return found["input_features"][0].T


@pytest.mark.slow
@pytest.mark.parametrize("length", [400, 559, 560, 12_345, 143_185, 480_000])
def test_log_mel_has_the_bits_of_whispers_extractor(length):
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=80)
    noise = 0.1 * torch.randn(length, generator=torch.Generator().manual_seed(length))
    sound = torch.from_numpy(tone(length / RATE + 1)[:length])
    for waveform in (noise, sound, torch.zeros(length)):
        expected = by_whisper(extractor, waveform)
        assert log_mel(waveform).shape == expected.shape == (length // 160, 80)
        assert (log_mel(waveform) - expected).abs().max() == 0.0


def test_less_than_a_window_is_filled_up():
    assert log_mel(torch.ones(1)).shape == (2, 80)
    assert torch.equal(
        log_mel(torch.ones(300)), log_mel(torch.cat((torch.ones(300), torch.zeros(100))))
    )


FORMATS = [(".wav", 8_000), (".wav", 48_000), (".flac", 32_000), (".ogg", 44_100), (".mp3", 16_000)]


@pytest.mark.parametrize(("suffix", "rate"), FORMATS)
def test_every_format_and_rate_gives_the_same_tone(tmp_path, suffix, rate):
    path = tmp_path / f"a{suffix}"
    soundfile.write(path, tone(rate=rate), rate)
    waveform = read_waveform(path)
    assert waveform.dtype == torch.float32
    assert abs(len(waveform) - RATE) <= (1 if suffix in (".wav", ".flac") else 2000)
    assert abs(pitch_of(waveform) - 440) < 2
    assert abs(float(waveform[2000:-2000].square().mean().sqrt()) - 0.5 / 2**0.5) < 0.02


def test_channels_are_averaged(tmp_path):
    left, right = tone(), -0.5 * tone()
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), RATE, subtype="FLOAT")
    found = read_waveform(tmp_path / "a.wav").numpy()
    np.testing.assert_allclose(found, 0.25 * tone(), atol=1e-6)


def test_channels_of_opposite_phase_are_not_silence(tmp_path):
    for name, right in (("opposite", -tone()), ("alike", tone())):
        soundfile.write(tmp_path / f"{name}.wav", np.stack([tone(), right], 1), RATE)
    opposite, alike = (read_waveform(tmp_path / f"{n}.wav") for n in ("opposite", "alike"))
    torch.testing.assert_close(opposite.abs(), alike.abs(), atol=1e-3, rtol=0)


def test_part_of_a_file_is_that_part(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(3.0), RATE, subtype="FLOAT")
    whole = read_waveform(tmp_path / "a.wav")
    part = read_waveform(tmp_path / "a.wav", start=0.5, seconds=1.25)
    assert torch.equal(part, whole[8_000:28_000])
    assert len(read_waveform(tmp_path / "a.wav", start=2.5, seconds=5.0)) == 8_000


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("gone.wav", None, "no such file"),
        ("empty.wav", b"", "the file is empty"),
        ("cut.wav", b"RIFF\x24\x00\x00\x00WA", "no readable sound"),
        ("voice.m4a", b"\0\0\0\x18ftypM4A ", "m4a is not read; ffmpeg -i"),
        ("nan.wav", np.array([0, np.nan], "f4"), ".* no numbers"),
        ("none.wav", np.zeros(0, "f4"), "the file holds no sound"),
    ],
)
def test_fault_27_broken_file_is_named_with_its_reason(tmp_path, name, content, reason):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, content, RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=f"{name}: {reason}"):
        read_waveform(path)


# --- cache ----------------------------------------------------------------------------------------


def test_cache_gives_the_same_numbers_cold_and_warm(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", tone(), RATE)
    exact = log_mel(read_waveform(tmp_path / "a.wav"))
    cache = FeatureCache(tmp_path / "cache")
    cold = cache.features(tmp_path / "a.wav")
    assert cold.dtype == torch.float32 and (cold - exact).abs().max() <= 2**-10
    monkeypatch.setattr(audio, "read_waveform", lambda _: pytest.fail("read again"))
    assert torch.equal(cache.features(tmp_path / "a.wav"), cold)


def test_cache_notices_that_a_file_has_changed(tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    soundfile.write(tmp_path / "a.wav", tone(), RATE)
    before = cache.features(tmp_path / "a.wav")
    soundfile.write(tmp_path / "a.wav", tone(pitch=2_000.0), RATE)
    assert not torch.equal(cache.features(tmp_path / "a.wav"), before)


def test_cache_passes_over_a_torn_file(tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    soundfile.write(tmp_path / "a.wav", tone(), RATE)
    before = cache.features(tmp_path / "a.wav")
    (stored,) = (tmp_path / "cache").rglob("*.npy")
    stored.write_bytes(stored.read_bytes()[:50])
    assert torch.equal(cache.features(tmp_path / "a.wav"), before)


def test_a_cut_file_is_heard_as_far_as_it_goes_and_never_as_silence(tmp_path, caplog):
    noise = np.random.default_rng(0).normal(0, 0.2, 20 * RATE).astype(np.float32)
    path = tmp_path / "cut.mp3"
    soundfile.write(path, noise, RATE, format="MP3")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 5])
    sounds = samples.Sounds(train=True, clip_seconds=2.0)
    torch.manual_seed(0)
    lengths = set()
    for _ in range(20):
        features = sounds.features(path)
        assert features.std() > 0.02 and features.max() > 0.5
        lengths.add(len(features))
    assert lengths == {200}
    assert caplog.text.count("the sound ends before its header says") == 1
