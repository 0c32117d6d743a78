"""Log-mel features: ours against transformers' WhisperFeatureExtractor, on one core.

python tests/benchmarks/log_mel.py          clips of ten seconds, median ratio and range
"""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import statistics
import time

import torch
from transformers import WhisperFeatureExtractor

from multimodal.pairs.audio import log_mel

ROUNDS, CLIPS = 15, 40


def seconds_of(work) -> float:
    began = time.process_time()
    for _ in range(CLIPS):
        work()
    return (time.process_time() - began) / CLIPS


def main() -> None:
    torch.set_num_threads(1)
    clip = 0.1 * torch.randn(160_000, generator=torch.Generator().manual_seed(0))
    extract = WhisperFeatureExtractor(feature_size=80, chunk_length=10)
    samples = clip.numpy()

    def theirs():
        return extract(samples, sampling_rate=16_000, return_tensors="pt")["input_features"]

    difference = float((log_mel(clip) - theirs()[0].T).abs().max())
    pairs = [(seconds_of(lambda: log_mel(clip)), seconds_of(theirs)) for _ in range(ROUNDS)]
    ratios = sorted(other / own for own, other in pairs)
    own, other = (1 / statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"largest difference {difference}")
    print(f"clips of 10 s a second: ours {own:.0f}, WhisperFeatureExtractor {other:.0f}")
    print(f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
