"""The filters' demo from training to best views, for the frozen seed and for another."""

import functools
import json

import pytest

from shared.files import read_json
from tests.harness import run_here
from vasevqa.demo_data import clip as demo_clip
from vasevqa.demo_data import vases as demo_vases
from vasevqa.filter import classifier, clipfilter1, clipfilter2, demo, model


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The demo's folders, here."""
    root = demo.ROOT
    for name in ("ROOT", "DATA", "CLIP", "RUNS", "SORTED", "FILTERED", "QUALITY"):
        below = getattr(demo, name).relative_to(root)
        monkeypatch.setattr(demo, name, tmp_path / below)
    return tmp_path


@pytest.mark.full
@pytest.mark.limit(600)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_demo_filters_what_is_damaged(place, monkeypatch, seed):
    build = functools.partial(demo_vases.build_images, seed=seed)
    monkeypatch.setattr(demo_vases, "build_images", build)
    for script in (model, classifier, clipfilter1, clipfilter2):
        outcome = run_here(script.main, ["--demo"])
        assert outcome.code == 0, outcome.text
    truth = read_json(place / "data" / "truth.json")
    runs = place / "runs" / "filter"
    status = read_json(runs / "quality" / ".quality_model" / "status.json")
    assert status["result"]["after"] > 0.9
    sorted_out = json.loads((runs / "images3" / "classification_report.json").read_text())
    assert {row["filename"] for row in sorted_out["results"]} == set(truth)
    label = {row["filename"]: row["label"] for row in sorted_out["results"]}
    right = [(label[name] == 1) == (kind in ("good", "broken")) for name, kind in truth.items()]
    assert sum(right) > 0.9 * len(truth)
    report = json.loads((runs / "filtered_vases" / "filtering_report.json").read_text())
    accepted = {row["filename"]: row["accepted"] for row in report["results"]}
    broken = [name for name in accepted if truth[name] == "broken"]
    good = [name for name in accepted if truth[name] == "good"]
    assert len(broken) >= 10
    assert sum(accepted[name] for name in broken) < 0.2 * len(broken)
    assert sum(accepted[name] for name in good) > 0.8 * len(good)
    stats = read_json(runs / "filtered_vases" / "filtering_stats.json")
    assert stats["summary"]["total_vases"] >= 25


@pytest.mark.parametrize(
    ("script", "first"),
    [(classifier, "model.py"), (clipfilter1, "classifier.py"), (clipfilter2, "clipfilter1.py")],
)
def test_a_demo_step_without_the_one_before_names_it(place, script, first, monkeypatch):
    monkeypatch.setattr(demo_vases, "build_images", demo_vases.ImagePaths)
    monkeypatch.setattr(demo_clip, "build", lambda folder: folder)
    outcome = run_here(script.main, ["--demo"])
    assert outcome.code == 2 and f"type python {first} --demo first" in outcome.last_line


@pytest.mark.slow
def test_the_demos_clip_is_the_same_for_the_same_settings():
    first, second = (demo_clip.train(steps=2, vases=6).state_dict() for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)
