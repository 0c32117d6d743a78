"""Retrieval with several captions and multi-label mAP against other people's definitions."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from multimodal.training import evaluation
from tests.harness import ROOT


def random_case(seed, items=40, captions=5, width=8, ragged=False):
    generator = torch.Generator().manual_seed(seed)
    counts = [captions] * items
    if ragged:
        counts = (torch.randint(1, 7, (items,), generator=generator)).tolist()
    owners = [item for item, count in enumerate(counts) for _ in range(count)]
    rows = normalize(torch.randn(items, width, generator=generator), dim=1)
    noise = torch.randn(len(owners), width, generator=generator)
    texts = normalize(rows[owners] + 1.5 * noise, dim=1)
    return rows, texts, owners


def recall_by_hits(similarity, belongs, k):
    """A query is found when any of the k best that it is given belongs to it."""
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(belongs, best, axis=1).any(axis=1).mean()


def map_at_10(similarity, belongs):
    values = []
    for row, truth in zip(similarity, belongs, strict=True):
        hits, total = 0, 0.0
        for rank, place in enumerate(np.argsort(-row, kind="stable")[:10], 1):
            if truth[place]:
                hits += 1
                total += hits / rank
        values.append(total / truth.sum())
    return np.mean(values)


@pytest.mark.parametrize(("seed", "ragged"), [(0, False), (1, True)])
def test_retrieval_with_several_captions_is_that_of_clip_benchmark(seed, ragged):
    rows, texts, owners = random_case(seed, ragged=ragged)
    belongs = np.arange(len(rows))[:, None] == np.array(owners)[None]
    similarity = (rows.double() @ texts.double().T).numpy()
    there, back = evaluation.both_ways(("image", "text"), rows, texts, owners)
    assert (there.name, back.name) == ("image to text", "text to image")
    for way, matrix, truth in ((there, similarity, belongs), (back, similarity.T, belongs.T)):
        for k in (1, 5, 10):
            assert way.metrics[f"R@{k}"] == pytest.approx(recall_by_hits(matrix, truth, k))
        assert way.metrics["mAP@10"] == pytest.approx(map_at_10(matrix, truth))
        assert (way.queries, way.gallery) == matrix.shape


def test_figures_by_hand():
    """Two pictures; the third caption, of picture 1, lies nearer to picture 0."""
    rows = torch.eye(2)
    texts = normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]]), dim=1)
    there, back = evaluation.both_ways(("image", "text"), rows, texts, [0, 1, 1])
    assert there.metrics["R@1"] == 1.0
    # picture 0: its caption first, 1/1. picture 1: its captions at 1 and 2, (1/1 + 2/2) / 2
    assert there.metrics["mAP@10"] == 1.0
    assert back.metrics["R@1"] == pytest.approx(2 / 3) and back.metrics["R@5"] == 1.0
    assert back.metrics["mAP@10"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert there.metrics["chance"] == back.metrics["chance"] == 0.5


def test_faces_find_every_voice_of_their_person():
    rows = torch.eye(4)[[0, 0, 1, 2]]
    groups = ["a", "a", "b", "c"]
    there, back = evaluation.same_group(("face", "voice"), rows, rows, groups)
    assert there.metrics["R@1"] == back.metrics["R@1"] == 1.0
    assert there.metrics["chance"] == pytest.approx((2 + 2 + 1 + 1) / 4 / 4)


def test_voices_find_others_of_their_speaker_and_not_themselves():
    near, far = [1.0, 0.1], [0.1, 1.0]
    rows = normalize(torch.tensor([near, near, far, far, [1.0, 0.2]]), dim=1)
    way = evaluation.same_voice(rows, ["a", "a", "b", "b", "b"])
    assert (way.name, way.queries, way.gallery) == ("voice to voice", 5, 4)
    assert way.metrics["R@1"] == 4 / 5  # the last one finds "a"
    assert way.metrics["chance"] == pytest.approx((1 + 1 + 2 + 2 + 2) / 5 / 4)


@pytest.mark.parametrize("ties", [False, True])
def test_mean_average_precision_is_scikit_learns(ties):
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(0)
    found = torch.randn(200, 12, generator=generator)
    found = found.mul(3).round() if ties else found
    labels = (torch.rand(200, 12, generator=generator) < 0.15).float()
    labels[:, 4] = 0  # occurs nowhere: left out
    value, occurring = evaluation.mean_average_precision(found, labels)
    wanted = [average_precision_score(labels[:, c], found[:, c]) for c in range(12) if c != 4]
    assert occurring == 11 and value == pytest.approx(np.mean(wanted), abs=1e-9)
    assert evaluation.mean_average_precision(found, torch.zeros(200, 12)) == (0.0, 0)


@pytest.mark.full
@pytest.mark.limit(600)
def test_25_000_captions_and_5_000_pictures_fit_in_a_gigabyte():
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import torch
        from torch.nn.functional import normalize
        from multimodal.training import evaluation
        torch.manual_seed(0)
        rows = normalize(torch.randn(5_000, 512), dim=1)
        owners = [place // 5 for place in range(25_000)]
        texts = normalize(rows[owners] + 0.04 * torch.randn(25_000, 512), dim=1)
        found = evaluation.both_ways(("image", "text"), rows, texts, owners)
        print(*(way.metrics["R@1"] for way in found))
        # not ru_maxrss, which begins with what the parent process held
        print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    recalls, peak = done.stdout.splitlines()
    assert all(0.5 < float(value) <= 1 for value in recalls.split())
    assert int(peak) < 1 << 20, f"{peak} KiB, of which torch itself takes two thirds"
