"""classifier.py, clipfilter1.py and clipfilter2.py on a handful of pictures, as users type them."""

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from shared import report
from shared.files import read_json, read_json_lines
from tests.harness import ROOT, run_here, start, status_of
from tests.vase_filter_nano import (
    vase_name,
    write_clip,
    write_net,
    write_picture,
    write_quality_set,
    write_views,
)
from vasevqa.filter import classifier, clipfilter1, clipfilter2, model
from vasevqa.filter.clip import Clip

FILTER = ROOT / "vasevqa" / "filter"
BAD = {"empty.jpg": b"", "tray 0/page.png": b"<!doctype html>"}


class counted:  # noqa: N801, used like a function
    """The contents that the image tower sees inside the block, one entry a picture."""

    def __enter__(self):
        seen = []
        original = Clip.encode_images

        def encode(clip, pixels):
            seen.extend(row.numpy().tobytes() for row in pixels)
            return original(clip, pixels)

        self._patch = mock.patch.object(Clip, "encode_images", encode)
        self._patch.start()
        return seen

    def __exit__(self, *_):
        self._patch.stop()


def flags_in(root, clip):
    """The flags that every call of clipfilter1 and 2 has here."""
    return [
        *("--input_dir", root / "in", "--output_dir", root / "out"),
        *("--model_cache_dir", clip, "--workers", 0),
    ]


def filtered(flags, *extra):
    outcome = run_here(clipfilter1.main, [*flags, *extra])
    assert outcome.code == 0, outcome.text
    return outcome


def encodes(flags, *extra):
    """How many pictures a filter run encodes."""
    with counted() as encoded:
        filtered(flags, *extra)
    return len(encoded)


def files_below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


def report_of(root, name="filtering_report.json"):
    return json.loads((root / "out" / name).read_text())


def agrees_with_folders(root):
    """How many files are accepted, rejected and set aside, by the report and by the folders."""
    found = report_of(root)
    places = {
        "accepted": {row["filename"] for row in found["results"] if row["accepted"]},
        "rejected": {row["filename"] for row in found["results"] if not row["accepted"]},
        "quarantine": {row["filename"] for row in found["unreadable"]},
    }
    for name, expected in places.items():
        assert files_below(root / "out" / name) == expected
    return tuple(map(len, places.values()))


def kept_files(root):
    """The files of scores, and how many files of embeddings there are."""
    scores = sorted(p.name for p in (root / "out" / ".clipfilter1").glob("*.jsonl"))
    return scores, len(list((root / "out").glob("embeddings-*")))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def first(clip, tmp_path_factory):
    """in/: five vases of three views, a copy of one, a file of another name, two that are corrupt.

    out/: what a run made of them that proposed its own threshold; said: what it said.
    """
    root = tmp_path_factory.mktemp("first")
    write_views(root / "in")
    shutil.copy(
        root / "in/tray 0" / vase_name(0, 1), root / "in" / f"{vase_name(0, 1)[:-4]} copy.jpg"
    )
    write_picture(root / "in" / "文物 1.webp", 77)
    for name, content in BAD.items():
        (root / "in" / name).write_bytes(content)
    before = {p: p.stat().st_mtime_ns for p in (root / "in").rglob("*")}
    (root / "said").write_text(filtered(flags_in(root, clip)).text)
    assert {p: p.stat().st_mtime_ns for p in (root / "in").rglob("*")} == before
    return root


@pytest.fixture
def place(first, tmp_path):
    """A copy of `first`: a run there finds its scores, its embeddings and its folders."""
    return shutil.copytree(first, tmp_path / "place")


@pytest.fixture
def flags(place, clip):
    return flags_in(place, clip)


# --- clipfilter1: what a run leaves ---------------------------------------------------------------


def test_a_filter_run_leaves_folders_and_a_report_that_agree(first):
    found = report_of(first)
    accepted, rejected, unreadable = agrees_with_folders(first)
    assert (accepted + rejected, unreadable) == (17, 2)
    assert found["total_images"] == 19 == len(files_below(first / "in"))
    assert (found["accepted_images"], found["rejected_images"]) == (accepted, rejected)
    assert found["acceptance_rate"] == pytest.approx(accepted / 19)
    assert 12 <= accepted <= 14  # 75 % of 17
    assert found["input_directory"] == str(first / "in")
    assert found["output_directory"] == str(first / "out")
    assert found["processing_time_seconds"] > 0
    for row in found["results"]:
        difference = row["high_quality_similarity"] - row["low_quality_similarity"]
        assert row["quality_score"] == pytest.approx(difference, abs=1e-9)
        assert row["accepted"] == (row["quality_score"] >= found["threshold"])
    assert {row["filename"] for row in found["unreadable"]} == set(BAD)
    said = (first / "said").read_text()
    assert "proposed threshold" in said and "exit 0" in said.splitlines()[-1]
    rows = list(read_json_lines(first / "out" / "filtering_report.jsonl"))
    assert {row["filename"] for row in rows if "problem" in row} == set(BAD) and len(rows) == 19


def test_the_analysis_says_how_the_scores_lie(first):
    found = read_json(first / "out" / "analysis.json")  # the sample is everything
    scores = np.array([row["quality_score"] for row in report_of(first)["results"]])
    expected = {"count": 17, "mean": scores.mean(), "std": scores.std(), "min": scores.min(),
                "max": scores.max(), "median": np.median(scores)}  # fmt: skip
    expected |= {f"p{n}": np.percentile(scores, n) for n in (10, 25, 50, 75, 90)}
    assert found["statistics"] == pytest.approx(expected)
    assert found["threshold"] == pytest.approx(np.percentile(scores, 25))
    keeps = {line["percentile"]: line["keeps"] for line in found["recommendations"]}
    assert keeps == {10: 0.9, 25: 0.75, 50: 0.5, 75: 0.25, 90: 0.1}


def test_the_pages_show_pictures_scores_settings_and_counts(first):
    run_dir, counts = first / "out" / ".clipfilter1", report_of(first)
    config, status = read_json(run_dir / "config.json"), status_of(run_dir)
    assert config["settings"]["workers"] == 0 and config["defaults"]["workers"] == 2
    assert status["state"] == "done"
    assert f"{counts['accepted_images']} of 19" in status["reason"]
    assert status["data"]["accepted"] == counts["accepted_images"]
    assert sum(status["data"].values()) == counts["total_images"]
    report.write(run_dir)
    sheet = (first / "out" / "contact_sheet.html").read_text()
    assert "<svg" in sheet
    for heading in ("Borderline", "Accepted, the best", "Rejected, the worst", "Unreadable"):
        assert f"<h2>{heading}" in sheet
    for text in (sheet, (run_dir / "report.html").read_text()):
        assert text.count("data:image/jpeg;base64") >= 17
        assert "config.json is missing" not in text


def test_the_score_is_the_originals_to_a_millionth(clip, tmp_path):
    """cos(picture, mean of high) - cos(picture, mean of low), by open_clip and Pillow alone."""
    for number in range(4):
        write_picture(tmp_path / "in" / f"{number}.png", number)
    high, low = ["a vase", "a whole vase"], ["shards", "dust", "a broken vase"]
    (tmp_path / "p.txt").write_text("\n".join(["[high]", *high, "[low]", *low]))
    filtered(flags_in(tmp_path, clip), "--prompts", tmp_path / "p.txt", "--threshold", 0)
    model, prepare = open_clip.create_model_from_pretrained(f"local-dir:{clip}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{clip}")
    for row in read_json_lines(tmp_path / "out" / "filtering_report.jsonl"):
        pixels = prepare(Image.open(tmp_path / "in" / row["filename"]).convert("RGB"))
        with torch.no_grad():
            own = model.eval().encode_image(pixels[None])
            texts = [model.encode_text(tokenize(group)) for group in (high, low)]
        to_high, to_low = (float(cosine_similarity(own, t.mean(0)[None])) for t in texts)
        assert row["quality_score"] == pytest.approx(to_high - to_low, abs=1e-6)
        assert row["high_quality_similarity"] == pytest.approx(to_high, abs=1e-6)
        assert row["low_quality_similarity"] == pytest.approx(to_low, abs=1e-6)
        each = cosine_similarity(own, torch.cat(texts)).tolist()
        assert row["prompt_scores"] == pytest.approx(each, abs=2e-6)


# --- clipfilter1: another decision ----------------------------------------------------------------


def test_another_threshold_decides_anew_from_known_scores(flags, place):
    (place / "out" / "analysis.json").unlink()
    assert encodes(flags, "--threshold", 2.0) == 0
    assert agrees_with_folders(place) == (0, 17, 2)
    assert report_of(place)["threshold"] == 2.0
    assert report_of(place)["threshold_source"] == "typed"
    assert not (place / "out" / "analysis.json").exists()  # no sample was looked at
    assert encodes(flags, "--keep", 0.25) == 0
    agrees_with_folders(place)
    scores = torch.tensor([row["quality_score"] for row in report_of(place)["results"]])
    assert report_of(place)["threshold"] == pytest.approx(float(scores.double().quantile(0.75)))


def test_no_picture_is_encoded_twice_from_analysis_to_views(flags, place):
    shutil.rmtree(place / "out")
    with counted() as encoded:
        filtered(flags, "--analyze_only", "--sample_size", 10)
        after_analysis = len(encoded)
        found = read_json(place / "out" / "analysis.json")
        asks = ["--auto_select_device", "--confirm"]
        said = filtered(flags, "--analyze_only", "--sample_size", 10, *asks).text
        assert "asks on a terminal alone: device auto" in said
        assert read_json(place / "out" / "analysis.json") == found  # the same sample
        assert not (place / "out" / "accepted").exists()
        filtered(flags, "--keep", 0.9)
        views = ["--input_dir", place / "out" / "accepted"]
        outcome = run_here(clipfilter2.main, [*flags, *views])
        assert outcome.code == 0, outcome.text
    assert 6 <= after_analysis <= 10
    # 17 readable files, two of the same content
    assert len(encoded) == len(set(encoded)) == 16
    assert found["sample_size"] == 10
    assert found["statistics"]["count"] + len(found["unreadable"]) == 10
    assert sum(found["histogram"]["counts"]) == found["statistics"]["count"]


def test_duplicates_keep_the_first_by_name(flags, place):
    filtered(flags, "--threshold", -2)
    (copy,) = [row for row in report_of(place)["results"] if "same_content_as" in row]
    assert copy["accepted"] and copy["same_content_as"] < copy["filename"]
    filtered(flags, "--threshold", -2, "--dedup")
    assert agrees_with_folders(place) == (16, 1, 2)
    (copy,) = [row for row in report_of(place)["results"] if "same_content_as" in row]
    assert not copy["accepted"]


def test_a_new_decision_moves_copies_and_follows_links_and_changed_sources(flags, place):
    name = next(row["filename"] for row in report_of(place)["results"] if row["accepted"])
    accepted, rejected = (place / "out" / f / name for f in ("accepted", "rejected"))
    before = accepted.stat()
    filtered(flags, "--threshold", 2)
    assert rejected.stat().st_ino == before.st_ino and not accepted.exists()  # not copied again
    assert rejected.stat().st_mtime_ns == (place / "in" / name).stat().st_mtime_ns
    filtered(flags, "--threshold", 2, "--link")
    agrees_with_folders(place)
    for path in (place / "out" / "rejected").rglob("*.jpg"):
        assert path.is_symlink() and path.resolve().is_relative_to((place / "in").resolve())
    write_picture(place / "in" / name, 99)
    assert encodes(flags, "--threshold", 2) == 1
    assert not rejected.is_symlink()
    assert rejected.read_bytes() == (place / "in" / name).read_bytes()


def test_what_no_report_names_is_moved_aside_and_not_deleted(flags, place):
    (place / "in" / "文物 1.webp").unlink()
    (place / "out" / "accepted" / "own notes").write_text("mine")
    (place / "out" / "rejected" / "文物 1.webp").write_text("an earlier run's")
    filtered(flags, "--threshold", -2)
    assert agrees_with_folders(place) == (16, 0, 2)
    aside = files_below(place / "out/.clipfilter1/aside")
    assert {"rejected/文物 1.webp", "accepted/own notes"} <= aside


def test_scores_of_other_prompts_are_other_scores(flags, place):
    before = report_of(place)["results"]
    (place / "p.txt").write_text("[high]\na red pot\n[low]\na blue pot\n")
    assert encodes(flags, "--prompts", place / "p.txt") == 0  # the pictures are the same
    after = report_of(place)
    assert after["results"] != before and after["prompts"]["high"] == ["a red pot"]


# --- clipfilter1: what is kept of a pass ----------------------------------------------------------


def test_a_row_cut_off_by_a_kill_is_scored_again_and_no_other(flags, place):
    whole = report_of(place)["results"]
    path = place / "out" / ".clipfilter1" / "scores.jsonl"
    os.truncate(path, path.stat().st_size - 5)
    assert encodes(flags) == 0  # its embedding is there
    assert report_of(place)["results"] == whole
    assert len(path.read_text().splitlines()) == 20  # the first names model and prompts


def test_rows_of_another_process_that_was_killed_are_taken_over(flags, place):
    whole = report_of(place)["results"]
    path = place / "out" / ".clipfilter1" / "scores.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:8]))
    path.with_name("scores.1.jsonl").write_bytes(b"".join(lines[8:]) + lines[2][:9])
    (embeddings,) = (place / "out").glob("embeddings-*")
    embeddings.unlink()  # nothing but the rows can say what is known
    assert encodes(flags) == 0
    assert report_of(place)["results"] == whole
    assert kept_files(place) == (["scores.jsonl"], 1)


def test_an_embedding_cut_off_by_a_kill_is_made_again_and_no_other(flags, place):
    """With those of another process, which are taken over."""
    (embeddings,) = (place / "out").glob("embeddings-*")
    content = embeddings.read_bytes()
    embeddings.unlink()
    embeddings.with_name(f"{embeddings.name}.1").write_bytes(content[: len(content) - 5])
    assert encodes(flags, "--resume", "never") == 1
    assert embeddings.stat().st_size == len(content)
    assert kept_files(place)[1] == 1


def test_a_cache_directory_serves_several_outputs(flags, place):
    second = ["--output_dir", place / "second", "--cache_dir", place / "out"]
    assert encodes([*flags, *second]) == 0
    assert not list((place / "second").glob("embeddings-*"))


@pytest.mark.full
@pytest.mark.limit(240)
def test_two_processes_decide_as_one_and_one_goes_on_where_two_stopped(first, flags, place):
    shutil.rmtree(place / "out")
    with start([FILTER / "clipfilter1.py", *flags, "--nproc", 2]) as running:
        outcome = running.finish()
        assert outcome.code == 0, outcome.text
        assert running.leaves_nothing()
    alone, both = report_of(first), report_of(place)
    assert agrees_with_folders(place)[2] == 2
    assert kept_files(place) == (["scores.jsonl"], 1)
    for name in ("results", "unreadable", "threshold", "total_images", "accepted_images"):
        assert both[name] == alone[name], name
    assert encodes(flags) == 0 and report_of(place)["results"] == alone["results"]


# --- clipfilter1: questions -----------------------------------------------------------------------


def test_a_question_is_asked_by_one_process_alone(monkeypatch):
    fit = clipfilter1.processes_that_fit
    monkeypatch.setattr(clipfilter1, "_is_terminal", lambda: True)
    assert fit(["--auto_select_device"], 4) == fit(["--confirm"], 4) == 1
    assert fit(["--confirm", "--yes"], 4) == fit([], 4) == 4
    monkeypatch.setattr(clipfilter1, "_is_terminal", lambda: False)
    assert fit(["--auto_select_device", "--confirm"], 4) == 4


def test_a_device_is_chosen_by_its_number(monkeypatch, capsys):
    monkeypatch.setattr(clipfilter1, "_is_terminal", lambda: True)
    monkeypatch.setattr(clipfilter1, "visible_gpus", lambda *_: 2)
    for answer, expected in (("3", "cuda:1"), ("1", "cpu"), ("", "auto"), ("9", "auto")):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert clipfilter1._ask_for_device("auto") == expected
    assert "1. cpu\n2. cuda:0\n3. cuda:1" in capsys.readouterr().out


def test_the_proposed_threshold_is_confirmed_on_a_terminal(monkeypatch, flags, place):
    monkeypatch.setattr(clipfilter1, "_is_terminal", lambda: True)
    shutil.rmtree(place / "out" / "accepted")
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert "not confirmed" in filtered(flags, "--confirm").text
    assert not (place / "out" / "accepted").exists()
    monkeypatch.setattr("builtins.input", lambda _: "-2")
    assert "17 of 19 pictures accepted" in filtered(flags, "--confirm").text


# --- clipfilter2 ----------------------------------------------------------------------------------


def test_views_are_selected_and_reported_with_the_documented_fields(flags, place):
    write_picture(place / "in" / vase_name(9, 1), 5)
    (place / "in" / vase_name(9, 2)).write_bytes(b"no picture")
    (place / "in" / vase_name(8, 2)).write_bytes(b"no picture")
    outcome = run_here(clipfilter2.main, flags)
    assert outcome.code == 0, outcome.text
    found = report_of(place, "best_views_report.json")
    # as in the original: the vases and images whose names match, readable or not
    assert (found["total_vases"], found["total_selected_images"]) == (7, 6)
    assert found["total_original_images"] == 18
    assert found["reduction_rate"] == pytest.approx(1 - 6 / 18)
    selected = {row["selected_filename"] for row in found["results"]}
    assert files_below(place / "out" / "best_views") == selected
    for row in found["results"]:
        scores = [view["clip_score"] for view in row["all_view_scores"]]
        assert row["clip_score"] == max(scores) and row["reason"] == "best_clip_score"
    half = next(row for row in found["results"] if row["vase_id"].startswith("00000009"))
    assert (half["total_views"], len(half["all_view_scores"])) == (2, 1)
    assert half["unreadable_views"] == [vase_name(9, 2)]
    assert found["vases_without_readable_view"] == [vase_name(8, 2).partition("_")[0]]
    assert len(found["unreadable_files"]) == 4
    assert len(found["unmatched_files"]) == 4  # the copy's name, the .webp, the two of BAD
    stats = report_of(place, "filtering_stats.json")
    chosen = torch.tensor([row["clip_score"] for row in found["results"]]).double()
    assert stats["summary"]["reduction_rate"] == "66.7%"
    minutes = found["processing_time_seconds"] / 60
    assert stats["summary"]["processing_time_minutes"] == f"{minutes:.1f}"
    assert stats["summary"]["average_clip_score"] == f"{chosen.mean():.4f}"
    assert stats["view_distribution"] == {"1": 1, "2": 1, "3": 5}
    extremes = {"min": float(chosen.min()), "max": float(chosen.max())}
    expected = {"mean": float(chosen.mean()), "std": float(chosen.std(correction=0))}
    assert stats["clip_score_stats"] == pytest.approx(extremes | expected, abs=1e-9)
    for name in (".clipfilter1", ".clipfilter2"):
        assert status_of(place / "out" / name)["state"] == "done"


def test_of_equal_views_the_first_wins_and_case_alone_makes_no_other_vase(clip, tmp_path):
    root = tmp_path / "in"
    for number, view in ((1, 3), (1, 2), (2, 1)):
        write_picture(root / vase_name(number, view), 5)
    (root / vase_name(1, 2)).rename(root / vase_name(1, 2).lower())
    (root / "Z.jpg").write_bytes(b"")
    outcome = run_here(clipfilter2.main, flags_in(tmp_path, clip))
    assert outcome.code == 0, outcome.text
    first, second = report_of(tmp_path, "best_views_report.json")["results"]
    assert first["vase_id"] == vase_name(1, 3).partition("_")[0]  # as its first file has it
    assert (first["selected_view"], first["total_views"]) == (2, 2)
    assert [view["view_number"] for view in first["all_view_scores"]] == [2, 3]
    assert (second["reason"], second["total_views"]) == ("only_one_view", 1)
    assert "all_view_scores" not in second


def test_another_pattern_reads_other_names_and_one_without_vases_is_refused(flags, place):
    outcome = run_here(clipfilter2.main, [*flags, "--pattern", r"^(x)(\d)$"])
    assert outcome.code == 2
    assert "19 of 19 names do not match --pattern" in outcome.last_line
    assert not (place / "out" / "best_views_report.json").exists()
    outcome = run_here(clipfilter2.main, [*flags, "--pattern", r"^(tray|文物) (\d)\.webp$"])
    assert outcome.code == 0, outcome.text
    found = report_of(place, "best_views_report.json")
    assert [row["vase_id"] for row in found["results"]] == ["文物"]
    assert len(found["unmatched_files"]) == 18


# --- the quality classifier -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def net_file(tmp_path_factory):
    return write_net(tmp_path_factory.mktemp("net") / "best_image_quality_model.pth")


def test_pictures_are_sorted_with_their_paths_and_reported(first, net_file, tmp_path):
    pictures = shutil.copytree(first / "in", tmp_path / "in")
    (pictures / "other").mkdir()
    shutil.copy(pictures / "tray 1" / vase_name(1, 1), pictures / "other" / vase_name(1, 1))
    out = tmp_path / "out"
    flags = ["--source_dir", pictures, "--target_dir", out, "--model_path", net_file]
    outcome = run_here(classifier.main, [*flags, "--workers", 0, "--batch_size", 7])
    assert outcome.code == 0, outcome.text
    found = report_of(tmp_path, "classification_report.json")
    rows = {row["filename"]: row for row in found["results"]}
    assert set(rows) == files_below(pictures) and found["total_images"] == 20
    for label in (0, 1):
        expected = {name for name, row in rows.items() if row["label"] == label}
        assert files_below(out / str(label)) == expected
    assert files_below(out / "quarantine") == set(BAD)
    for name, row in rows.items():
        if name not in BAD:
            assert row["label"] == (row["probability_high"] >= 0.5)
        else:
            assert row["reason"]
    with (out / "classification_report.csv").open(encoding="utf-8", newline="") as stream:
        listed = list(csv.DictReader(stream))
    assert [row["filename"] for row in listed] == sorted(rows)
    assert listed[0].keys() == {"filename", "label", "probability_high", "reason"}
    probabilities = sorted(r["probability_high"] for r in rows.values() if r["label"] is not None)
    middle = (probabilities[8] + probabilities[9]) / 2
    again = run_here(classifier.main, [*flags, "--threshold", middle, "--link"])
    assert again.code == 0, again.text
    assert len(files_below(out / "1")) == 9
    assert all(p.is_symlink() for p in (out / "1").rglob("*.jpg"))


def test_the_name_of_earlier_trainings_is_read_too(net_file, tmp_path):
    old = tmp_path / "best_image_quality_model2.pth"
    shutil.copy(net_file, old)
    made = classifier.Config(model_path=tmp_path / "best_image_quality_model.pth")
    assert classifier._model_at(made) == old
    shutil.copy(net_file, made.model_path)
    assert classifier._model_at(made) == made.model_path


TINY = ["--arch", "resnet10", "--image_size", 32, "--workers", 0, "--pretrained", "none"]


@pytest.mark.slow
def test_a_training_writes_the_documented_files_and_its_model_sorts(tmp_path):
    data = write_quality_set(tmp_path / "images2", each=20)
    (data / "0" / "broken.jpg").write_bytes(b"no picture at all")
    flags = [*TINY, "--data_dir", data, "--output_dir", tmp_path / "out", "--batch_size", 8]
    refused = run_here(model.main, [*flags, "--max_unreadable", 0.01])
    assert refused.code == 2 and "at most 1% may be left out" in refused.last_line
    outcome = run_here(model.main, [*flags, "--num_epochs", 3])
    assert outcome.code == 0, outcome.text
    out = tmp_path / "out"
    best = torch.load(out / "best_image_quality_model.pth", weights_only=True)
    assert {"epoch", "model_state_dict", "optimizer_state_dict", "val_acc"} <= best.keys()
    results = read_json(out / "training_results.json")
    assert results["pictures"] == {"train": 32, "val": 4, "test": 4}
    assert list(results["left_out"]) == ["0/broken.jpg"]
    assert results["started_from"] == "random weights"
    assert "starting from random weights, as asked" in outcome.text
    assert sum(map(sum, results["confusion_matrix"])) == 4
    assert len(results["history"]["val_acc"]) == 3
    assert best["val_acc"] == max(results["history"]["val_acc"]) == results["best_val_acc"]
    assert (out / "training_history.png").stat().st_size > 1000
    status = read_json(out / ".quality_model" / "status.json")
    assert status["result"]["after"] == results["test_acc"]
    again = run_here(model.main, [*flags, "--num_epochs", 1])
    assert again.code == 0 and "the model of an earlier run is now" in again.text
    assert (out / "best_image_quality_model.1.pth").exists()
    sort = ["--source_dir", data, "--target_dir", tmp_path / "images3", "--workers", 0,
            "--model_path", out / "best_image_quality_model.1.pth"]  # fmt: skip
    assert run_here(classifier.main, sort).code == 0


@pytest.mark.slow
def test_patience_stops_early_and_a_small_set_makes_a_small_batch(tmp_path):
    data = write_quality_set(tmp_path / "images2", each=6)
    flags = [*TINY, "--data_dir", data, "--output_dir", tmp_path / "out", "--lr", 1e-9]
    outcome = run_here(model.main, [*flags, "--num_epochs", 50, "--patience", 2])
    assert outcome.code == 0, outcome.text
    assert "batch size 8 instead of 256" in outcome.text
    assert len(read_json(tmp_path / "out/training_results.json")["history"]["val_acc"]) == 3


def test_editing_a_constant_in_model_py_changes_the_default(tmp_path):
    copy = tmp_path / "house" / "vasevqa" / "filter"
    copy.mkdir(parents=True)
    (tmp_path / "house" / "shared").symlink_to(ROOT / "shared")
    text = (FILTER / "model.py").read_text()
    edits = {"BATCH_SIZE = 256": "BATCH_SIZE = 7", "NUM_EPOCHS = 200": "NUM_EPOCHS = 3",
             "DEFAULT_GPU = 2": "DEFAULT_GPU = 0", '"images2"': '"mine"'}  # fmt: skip
    for documented, edited in edits.items():
        assert text.count(documented) == 1
        text = text.replace(documented, edited)
    (copy / "model.py").write_text(text)
    shown = subprocess.run([sys.executable, "model.py", "--print-config"], cwd=copy, check=True,
                           capture_output=True, text=True)  # fmt: skip
    found = json.loads(shown.stdout)
    values = (found["batch_size"], found["num_epochs"], found["gpu"], found["data_dir"])
    assert values == (7, 3, 0, str(copy / "mine"))


def test_the_net_and_the_predictor_are_found_where_the_document_has_them(monkeypatch):
    """`from model import …` in filter/."""
    monkeypatch.syspath_prepend(FILTER)
    monkeypatch.setitem(sys.modules, "model", None)
    monkeypatch.delitem(sys.modules, "model")
    found = importlib.import_module("model")
    assert found.ImageQualityNet.__name__ == "ImageQualityNet"
    assert found.ImageQualityPredictor.__name__ == "ImageQualityPredictor"
