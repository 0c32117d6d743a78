"""classifier.py, clipfilter1.py and clipfilter2.py on a handful of pictures, as users type them."""

import csv
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
    write_picture,
    write_quality_set,
    write_views,
)
from vasevqa.filter import classifier, clipfilter1, clipfilter2, model
from vasevqa.filter.clip import Clip
from vasevqa.filter.quality import ImageQualityNet

FILTER = ROOT / "vasevqa" / "filter"
BAD = {"empty.jpg": b"", "tray 0/page.png": b"<!doctype html>"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def pictures(tmp_path):
    """Five vases of three views, a copy of one, two files of other names, two that are corrupt."""
    root = write_views(tmp_path / "in")
    shutil.copy(root / "tray 0" / vase_name(0, 1), root / f"{vase_name(0, 1)[:-4]} copy.jpg")
    write_picture(root / "文物 1.webp", 77)
    for name, content in BAD.items():
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def flags(pictures, clip, tmp_path):
    """The flags that every call of clipfilter1 has here."""
    return [
        *("--input_dir", pictures, "--output_dir", tmp_path / "out"),
        *("--model_cache_dir", clip, "--workers", 0),
    ]


@pytest.fixture
def view_flags(clip, tmp_path):
    out = tmp_path / "out"
    return [
        *("--input_dir", out / "accepted", "--output_dir", out),
        *("--model_cache_dir", clip, "--workers", 0),
    ]


def filtered(flags, *extra):
    outcome = run_here(clipfilter1.main, [*flags, *extra])
    assert outcome.code == 0, outcome.text
    return outcome


def files_below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


def report_of(tmp_path, name="filtering_report.json"):
    return json.loads((tmp_path / "out" / name).read_text())


def agrees_with_folders(tmp_path, report):
    accepted = {row["filename"] for row in report["results"] if row["accepted"]}
    rejected = {row["filename"] for row in report["results"] if not row["accepted"]}
    assert files_below(tmp_path / "out" / "accepted") == accepted
    assert files_below(tmp_path / "out" / "rejected") == rejected
    unreadable = {row["filename"] for row in report["unreadable"]}
    assert files_below(tmp_path / "out" / "quarantine") == unreadable
    return len(accepted), len(rejected), len(unreadable)


def kept_files(tmp_path):
    """The files of scores, and how many files of embeddings there are."""
    scores = sorted(p.name for p in (tmp_path / "out" / ".clipfilter1").glob("*.jsonl"))
    return scores, len(list((tmp_path / "out").glob("embeddings-*")))


# --- clipfilter1 ----------------------------------------------------------------------------------


def test_a_filter_run_leaves_folders_and_a_report_that_agree(flags, pictures, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in pictures.rglob("*")}
    outcome = filtered(flags)
    report = report_of(tmp_path)
    accepted, rejected, unreadable = agrees_with_folders(tmp_path, report)
    assert (accepted + rejected, unreadable) == (17, 2)
    assert report["total_images"] == 19 == len(files_below(pictures))
    assert (report["accepted_images"], report["rejected_images"]) == (accepted, rejected)
    assert report["acceptance_rate"] == pytest.approx(accepted / 19)
    assert 12 <= accepted <= 14  # 75 % of 17
    assert report["input_directory"] == str(pictures)
    assert report["processing_time_seconds"] > 0
    for row in report["results"]:
        assert row["quality_score"] == pytest.approx(
            row["high_quality_similarity"] - row["low_quality_similarity"], abs=1e-9
        )
        assert row["accepted"] == (row["quality_score"] >= report["threshold"])
    assert {row["filename"] for row in report["unreadable"]} == set(BAD)
    assert "proposed threshold" in outcome.text and "exit 0" in outcome.last_line
    assert {p: p.stat().st_mtime_ns for p in pictures.rglob("*")} == before
    status = read_json(tmp_path / "out" / ".clipfilter1" / "status.json")
    assert status["state"] == "done" and f"{accepted} of 19" in status["reason"]


def test_the_rows_as_json_lines_have_every_prompts_score(flags, tmp_path):
    filtered(flags, "--threshold", 0)
    rows = list(read_json_lines(tmp_path / "out" / "filtering_report.jsonl"))
    assert len(rows) == 19
    assert all(len(row["prompt_scores"]) == 16 for row in rows if "problem" not in row)
    assert {row["filename"] for row in rows if "problem" in row} == set(BAD)


def test_a_typed_threshold_decides_without_a_sample(flags, tmp_path):
    filtered(flags, "--threshold", 2.0)
    report = report_of(tmp_path)
    assert report["threshold"] == 2.0 and report["threshold_source"] == "typed"
    assert agrees_with_folders(tmp_path, report) == (0, 17, 2)
    assert not (tmp_path / "out" / "analysis.json").exists()


def test_another_threshold_decides_anew_from_known_scores(flags, tmp_path):
    filtered(flags, "--threshold", 2.0)
    with counted() as encoded:
        filtered(flags, "--threshold", -2.0)
        assert agrees_with_folders(tmp_path, report_of(tmp_path)) == (17, 0, 2)
        filtered(flags, "--keep", 0.5)
        agrees_with_folders(tmp_path, report_of(tmp_path))
    assert encoded == []
    assert kept_files(tmp_path) == (["scores.jsonl"], 1)


def test_the_analysis_says_how_the_scores_lie(flags, tmp_path):
    filtered(flags)  # the sample is everything
    found = read_json(tmp_path / "out" / "analysis.json")
    scores = np.array([row["quality_score"] for row in report_of(tmp_path)["results"]])
    expected = {"count": 17, "mean": scores.mean(), "std": scores.std(), "min": scores.min(),
                "max": scores.max(), "median": np.median(scores)}  # fmt: skip
    expected |= {f"p{n}": np.percentile(scores, n) for n in (10, 25, 50, 75, 90)}
    assert found["statistics"] == pytest.approx(expected)
    assert found["threshold"] == pytest.approx(np.percentile(scores, 25))
    keeps = {line["percentile"]: line["keeps"] for line in found["recommendations"]}
    assert keeps == {10: 0.9, 25: 0.75, 50: 0.5, 75: 0.25, 90: 0.1}


def test_keep_is_the_share_of_the_sample_that_the_threshold_keeps(flags, tmp_path):
    filtered(flags, "--keep", 0.25)
    report = report_of(tmp_path)
    scores = [row["quality_score"] for row in report["results"]]
    assert report["threshold"] == pytest.approx(float(torch.tensor(scores).double().quantile(0.75)))


def test_analysing_filters_nothing_and_counts_no_unreadable_file(flags, tmp_path):
    filtered(flags, "--analyze_only", "--sample_size", 10)
    assert not (tmp_path / "out" / "accepted").exists()
    found = read_json(tmp_path / "out" / "analysis.json")
    assert found["sample_size"] == 10
    assert found["statistics"]["count"] + len(found["unreadable"]) == 10
    assert sum(found["histogram"]["counts"]) == found["statistics"]["count"]
    again = filtered(flags, "--analyze_only", "--sample_size", 10)
    assert read_json(tmp_path / "out" / "analysis.json") == found, again.text


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


def test_no_picture_is_encoded_twice_from_analysis_to_views(flags, view_flags):
    with counted() as encoded:
        filtered(flags, "--analyze_only", "--sample_size", 9)
        after_analysis = len(encoded)
        filtered(flags, "--keep", 0.9)
        outcome = run_here(clipfilter2.main, view_flags)
        assert outcome.code == 0, outcome.text
    assert 5 <= after_analysis <= 9
    # 17 readable files, two of the same content
    assert len(encoded) == len(set(encoded)) == 16


def test_duplicates_keep_the_first_by_name(flags, tmp_path):
    filtered(flags, "--threshold", -2)
    copies = [row for row in report_of(tmp_path)["results"] if "same_content_as" in row]
    assert [row["accepted"] for row in copies] == [True]
    filtered(flags, "--threshold", -2, "--dedup")
    report = report_of(tmp_path)
    assert agrees_with_folders(tmp_path, report) == (16, 1, 2)
    (copy,) = [row for row in report["results"] if "same_content_as" in row]
    assert not copy["accepted"] and copy["same_content_as"] < copy["filename"]


def test_links_lead_to_the_sources(flags, pictures, tmp_path):
    filtered(flags, "--threshold", -2, "--link")
    agrees_with_folders(tmp_path, report_of(tmp_path))
    for path in (tmp_path / "out" / "accepted").rglob("*.jpg"):
        assert path.is_symlink() and path.resolve().is_relative_to(pictures.resolve())


def test_what_no_report_names_is_moved_aside_and_not_deleted(flags, pictures, tmp_path):
    filtered(flags, "--threshold", -2)
    (pictures / "文物 1.webp").unlink()
    (tmp_path / "out" / "accepted" / "own notes").write_text("mine")
    filtered(flags, "--threshold", -2)
    assert agrees_with_folders(tmp_path, report_of(tmp_path)) == (16, 0, 2)
    aside = tmp_path / "out/.clipfilter1/aside"
    assert files_below(aside) == {"accepted/文物 1.webp", "accepted/own notes"}


def test_a_new_decision_moves_copies_and_follows_changed_sources(flags, pictures, tmp_path):
    name = f"tray 1/{vase_name(1, 1)}"
    accepted, rejected = (tmp_path / "out" / f / name for f in ("accepted", "rejected"))
    filtered(flags, "--threshold", -2)
    before = accepted.stat()
    filtered(flags, "--threshold", 2)
    assert rejected.stat().st_ino == before.st_ino and not accepted.exists()  # not copied again
    assert rejected.stat().st_mtime_ns == (pictures / name).stat().st_mtime_ns
    filtered(flags, "--threshold", 2, "--link")
    assert rejected.is_symlink()
    write_picture(pictures / name, 99)
    with counted() as encoded:
        filtered(flags, "--threshold", 2)
    assert len(encoded) == 1 and not rejected.is_symlink()
    assert rejected.read_bytes() == (pictures / name).read_bytes()


# --- what is kept of a pass -----------------------------------------------------------------------


def encodes(flags, *extra):
    """How many pictures the same command encodes when it is typed again."""
    with counted() as encoded:
        filtered(flags, "--threshold", 0, *extra)
    return len(encoded)


def test_a_row_cut_off_by_a_kill_is_scored_again_and_no_other(flags, tmp_path):
    filtered(flags, "--threshold", 0)
    whole = report_of(tmp_path)["results"]
    path = tmp_path / "out" / ".clipfilter1" / "scores.jsonl"
    os.truncate(path, path.stat().st_size - 5)
    assert encodes(flags) == 0  # its embedding is there
    assert report_of(tmp_path)["results"] == whole
    assert len(path.read_text().splitlines()) == 20  # the first names model and prompts


def test_rows_of_another_process_that_was_killed_are_taken_over(flags, tmp_path):
    filtered(flags, "--threshold", 0)
    whole = report_of(tmp_path)["results"]
    path = tmp_path / "out" / ".clipfilter1" / "scores.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:8]))
    path.with_name("scores.1.jsonl").write_bytes(b"".join(lines[8:]) + lines[2][:9])
    (embeddings,) = (tmp_path / "out").glob("embeddings-*")
    embeddings.unlink()  # nothing but the rows can say what is known
    assert encodes(flags) == 0
    assert report_of(tmp_path)["results"] == whole
    assert kept_files(tmp_path) == (["scores.jsonl"], 1)


def test_an_embedding_cut_off_by_a_kill_is_made_again_and_no_other(flags, tmp_path):
    filtered(flags, "--threshold", 0)
    (embeddings,) = (tmp_path / "out").glob("embeddings-*")
    content = embeddings.read_bytes()
    embeddings.write_bytes(content[: len(content) - 5])
    assert encodes(flags, "--resume", "never") == 1
    assert embeddings.stat().st_size == len(content)


def test_embeddings_of_another_process_are_taken_over(flags, tmp_path):
    filtered(flags, "--threshold", 0)
    (embeddings,) = (tmp_path / "out").glob("embeddings-*")
    embeddings.rename(embeddings.with_name(f"{embeddings.name}.1"))
    assert encodes(flags, "--resume", "never") == 0
    assert kept_files(tmp_path)[1] == 1


def test_a_cache_directory_serves_several_outputs(flags, tmp_path):
    cache = ["--cache_dir", tmp_path / "cache"]
    filtered([*flags, *cache], "--threshold", 0)
    assert kept_files(tmp_path)[1] == 0
    assert encodes([*flags, *cache], "--output_dir", tmp_path / "second") == 0


def test_what_the_first_edition_kept_is_named_and_stays(flags, tmp_path):
    old = tmp_path / "out" / ".clipfilter1" / "scores-abc" / "part-0000.jsonl"
    old.parent.mkdir(parents=True)
    old.write_text('{"filename": "a.jpg"}\n')
    outcome = filtered(flags, "--threshold", 0)
    assert f"{old} is of the first edition: it stays as it is, is not read" in outcome.text
    assert old.read_text() == '{"filename": "a.jpg"}\n'
    assert "first edition" not in filtered(flags, "--threshold", 0).text


def test_the_score_is_the_originals_to_a_millionth(clip, tmp_path):
    """cos(picture, mean of high) - cos(picture, mean of low), by open_clip and Pillow alone."""
    for number in range(4):
        write_picture(tmp_path / "in" / f"{number}.png", number)
    high, low = ["a vase", "a whole vase"], ["shards", "dust", "a broken vase"]
    (tmp_path / "p.txt").write_text("\n".join(["[high]", *high, "[low]", *low]))
    filtered(["--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out", "--prompts",
              tmp_path / "p.txt", "--model_cache_dir", clip, "--threshold", 0])  # fmt: skip
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


def test_scores_of_other_prompts_are_other_scores(flags, tmp_path):
    filtered(flags, "--threshold", 0)
    first = report_of(tmp_path)["results"]
    (tmp_path / "p.txt").write_text("[high]\na red pot\n[low]\na blue pot\n")
    with counted() as encoded:
        filtered(flags, "--threshold", 0, "--prompts", tmp_path / "p.txt")
    assert encoded == []  # the pictures are the same
    second = report_of(tmp_path)
    assert second["results"] != first and second["prompts"]["high"] == ["a red pot"]


def test_the_contact_sheet_shows_pictures_and_the_scores(flags, tmp_path):
    filtered(flags)
    text = (tmp_path / "out" / "contact_sheet.html").read_text()
    for heading in ("Borderline", "Accepted, the best", "Rejected, the worst", "Unreadable"):
        assert f"<h2>{heading}" in text
    assert text.count("data:image/jpeg;base64") >= 17 and "<svg" in text


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_the_run_s_own_page_has_settings_counts_and_the_sheet(flags, tmp_path, resume):
    filtered([*flags, "--resume", resume, "--threshold", "0.0"])
    run_dir, counts = tmp_path / "out" / ".clipfilter1", report_of(tmp_path)
    config, status = read_json(run_dir / "config.json"), status_of(run_dir)
    assert config["settings"]["threshold"] == 0.0 and "threshold" in config["defaults"]
    assert status["data"]["accepted"] == counts["accepted_images"]
    assert sum(status["data"].values()) == counts["total_images"]
    report.write(run_dir)
    text = (run_dir / "report.html").read_text()
    assert "config.json is missing" not in text and "data:image/jpeg;base64" in text


@pytest.mark.slow
@pytest.mark.limit(240)
def test_two_processes_decide_as_one_and_one_goes_on_where_two_stopped(flags, tmp_path):
    filtered(flags)
    alone = report_of(tmp_path)
    shutil.rmtree(tmp_path / "out")
    with start([FILTER / "clipfilter1.py", *flags, "--nproc", 2]) as running:
        outcome = running.finish()
        assert outcome.code == 0, outcome.text
        assert running.leaves_nothing()
    both = report_of(tmp_path)
    assert agrees_with_folders(tmp_path, both)[2] == 2
    assert kept_files(tmp_path) == (["scores.jsonl"], 1)
    for name in ("results", "unreadable", "threshold", "total_images", "accepted_images"):
        assert both[name] == alone[name], name
    with counted() as encoded:
        filtered(flags)
    assert encoded == [] and report_of(tmp_path)["results"] == alone["results"]


@pytest.mark.full
@pytest.mark.limit(240)
def test_torchrun_shards_the_files_too(flags, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2]
    with start([FILTER / "clipfilter1.py", *flags, "--threshold", 0], program=torchrun) as running:
        assert running.finish().code == 0, running.text
    agrees_with_folders(tmp_path, report_of(tmp_path))
    assert kept_files(tmp_path) == (["scores.jsonl"], 1)


# --- clipfilter2 ----------------------------------------------------------------------------------


@pytest.fixture
def accepted(flags, tmp_path):
    filtered(flags, "--threshold", -2)
    return tmp_path / "out"


def test_views_are_selected_and_reported_with_the_documented_fields(accepted, view_flags):
    write_picture(accepted / "accepted" / vase_name(9, 1), 5)
    (accepted / "accepted" / vase_name(9, 2)).write_bytes(b"no picture")
    (accepted / "accepted" / vase_name(8, 2)).write_bytes(b"no picture")
    outcome = run_here(clipfilter2.main, view_flags)
    assert outcome.code == 0, outcome.text
    report = json.loads((accepted / "best_views_report.json").read_text())
    # as in the original: the vases and images whose names match, readable or not
    assert (report["total_vases"], report["total_selected_images"]) == (7, 6)
    assert report["total_original_images"] == 18
    assert report["reduction_rate"] == pytest.approx(1 - 6 / 18)
    selected = {row["selected_filename"] for row in report["results"]}
    assert files_below(accepted / "best_views") == selected
    for row in report["results"]:
        scores = [view["clip_score"] for view in row["all_view_scores"]]
        assert row["clip_score"] == max(scores) and row["reason"] == "best_clip_score"
    half = next(row for row in report["results"] if row["vase_id"].startswith("00000009"))
    assert (half["total_views"], len(half["all_view_scores"])) == (2, 1)
    assert half["unreadable_views"] == [vase_name(9, 2)]
    assert report["vases_without_readable_view"] == [vase_name(8, 2).partition("_")[0]]
    assert len(report["unreadable_files"]) == 2
    assert len(report["unmatched_files"]) == 2  # the copy's name and the .webp
    matched = sum(row["total_views"] for row in report["results"])
    assert matched + 1 == report["total_original_images"]  # one of a vase without a view
    stats = read_json(accepted / "filtering_stats.json")
    chosen = torch.tensor([row["clip_score"] for row in report["results"]]).double()
    assert stats["summary"]["reduction_rate"] == "66.7%"
    minutes = report["processing_time_seconds"] / 60
    assert stats["summary"]["processing_time_minutes"] == f"{minutes:.1f}"
    assert stats["summary"]["average_clip_score"] == f"{chosen.mean():.4f}"
    assert stats["view_distribution"] == {"1": 1, "2": 1, "3": 5}
    expected = {
        "min": float(chosen.min()),
        "max": float(chosen.max()),
        "mean": float(chosen.mean()),
        "std": float(chosen.std(correction=0)),
    }
    assert stats["clip_score_stats"] == pytest.approx(expected, abs=1e-9)
    assert read_json(accepted / ".clipfilter2/status.json")["state"] == "done"
    assert read_json(accepted / ".clipfilter1/status.json")["state"] == "done"


def test_of_equal_views_the_first_wins_and_case_alone_makes_no_other_vase(clip, tmp_path):
    root = tmp_path / "in"
    for number, view in ((1, 3), (1, 2), (2, 1)):
        write_picture(root / vase_name(number, view), 5)
    (root / vase_name(1, 2)).rename(root / vase_name(1, 2).lower())
    (root / "Z.jpg").write_bytes(b"")
    flags = ["--input_dir", root, "--output_dir", tmp_path / "out", "--model_cache_dir", clip]
    outcome = run_here(clipfilter2.main, flags)
    assert outcome.code == 0, outcome.text
    first, second = json.loads((tmp_path / "out/best_views_report.json").read_text())["results"]
    assert first["vase_id"] == vase_name(1, 3).partition("_")[0]  # as its first file has it
    assert (first["selected_view"], first["total_views"]) == (2, 2)
    assert [view["view_number"] for view in first["all_view_scores"]] == [2, 3]
    assert (second["reason"], second["total_views"]) == ("only_one_view", 1)
    assert "all_view_scores" not in second


def test_another_pattern_reads_other_names(accepted, view_flags):
    pattern = r"^(tray|文物) (\d)\.webp$"
    outcome = run_here(clipfilter2.main, [*view_flags, "--pattern", pattern])
    assert outcome.code == 0, outcome.text
    report = json.loads((accepted / "best_views_report.json").read_text())
    assert [row["vase_id"] for row in report["results"]] == ["文物"]
    assert len(report["unmatched_files"]) == 16


def test_a_folder_without_vases_is_refused(accepted, view_flags):
    outcome = run_here(clipfilter2.main, [*view_flags, "--pattern", r"^(x)(\d)$"])
    assert outcome.code == 2
    assert "17 of 17 names do not match --pattern" in outcome.last_line
    assert not (accepted / "best_views_report.json").exists()


# --- the quality classifier -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def net_file(tmp_path_factory):
    """A net that calls a picture good by how light it is, to the eye of its head alone."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "best_image_quality_model.pth"
    net = ImageQualityNet(arch="resnet10")
    content = {"model_state_dict": net.state_dict(), "arch": "resnet10", "image_size": 32}
    torch.save(content | {"epoch": 1, "val_acc": 1.0}, path)
    return path


def test_pictures_are_sorted_with_their_paths_and_reported(pictures, net_file, tmp_path):
    (pictures / "other").mkdir()
    shutil.copy(pictures / "tray 1" / vase_name(1, 1), pictures / "other" / vase_name(1, 1))
    out = tmp_path / "out"
    flags = ["--source_dir", pictures, "--target_dir", out, "--model_path", net_file]
    outcome = run_here(classifier.main, [*flags, "--workers", 0, "--batch_size", 7])
    assert outcome.code == 0, outcome.text
    report = json.loads((out / "classification_report.json").read_text())
    rows = {row["filename"]: row for row in report["results"]}
    assert set(rows) == files_below(pictures) and report["total_images"] == 20
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


def test_the_name_of_earlier_trainings_is_read_too(pictures, net_file, monkeypatch, tmp_path):
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
    outcome = run_here(model.main, [*flags, "--num_epochs", 4])
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
    assert len(results["history"]["val_acc"]) == 4
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


@pytest.mark.slow
@pytest.mark.limit(240)
def test_two_processes_train_together_on_the_global_batch(tmp_path):
    data = write_quality_set(tmp_path / "images2", each=12)
    flags = [*TINY, "--data_dir", data, "--output_dir", tmp_path / "out", "--batch_size", 8]
    with start([FILTER / "model.py", *flags, "--num_epochs", 2, "--nproc", 2]) as running:
        outcome = running.finish()
        assert outcome.code == 0, outcome.text
    assert "8 pictures a step = 2 process(es) x 4" in outcome.text
    results = read_json(tmp_path / "out/training_results.json")
    assert sum(map(sum, results["confusion_matrix"])) == results["pictures"]["test"]


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [("BATCH_SIZE = 256", "batch_size", 7), ("NUM_EPOCHS = 200", "num_epochs", 3),
     ("DEFAULT_GPU = 2", "gpu", 0), ('DATA_DIR = "images2"', "data_dir", "mine")],
)  # fmt: skip
def test_editing_a_constant_in_model_py_changes_the_default(line, field, value, tmp_path):
    copy = tmp_path / "house" / "vasevqa" / "filter"
    copy.mkdir(parents=True)
    (tmp_path / "house" / "shared").symlink_to(ROOT / "shared")
    text = (FILTER / "model.py").read_text()
    assert line in text
    edited = f"{line.partition(' = ')[0]} = {value!r}"
    (copy / "model.py").write_text(text.replace(line, edited))
    shown = subprocess.run([sys.executable, "model.py", "--print-config"], cwd=copy, check=True,
                           capture_output=True, text=True)  # fmt: skip
    expected = str(copy / value) if field == "data_dir" else value
    assert json.loads(shown.stdout)[field] == expected


def test_the_net_and_the_predictor_are_found_where_the_document_has_them():
    code = "from model import ImageQualityNet, ImageQualityPredictor as P; print(P.__name__)"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=FILTER, capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert shown.stdout.split() == ["ImageQualityPredictor"]


def test_a_question_is_asked_by_one_process_alone(monkeypatch):
    fit = clipfilter1.processes_that_fit
    monkeypatch.setattr(clipfilter1, "_is_terminal", lambda: True)
    assert fit(["--auto_select_device"], 4) == fit(["--confirm"], 4) == 1
    assert fit(["--confirm", "--yes"], 4) == fit([], 4) == 4
    monkeypatch.setattr(clipfilter1, "_is_terminal", lambda: False)
    assert fit(["--auto_select_device", "--confirm"], 4) == 4


def test_without_a_terminal_the_device_is_not_asked_for(flags):
    outcome = filtered(flags, "--auto_select_device", "--analyze_only")
    assert "asks on a terminal alone: device auto" in outcome.text


def test_a_device_is_chosen_by_its_number(monkeypatch, capsys):
    monkeypatch.setattr(clipfilter1, "_is_terminal", lambda: True)
    monkeypatch.setattr(clipfilter1, "visible_gpus", lambda *_: 2)
    for answer, expected in (("3", "cuda:1"), ("1", "cpu"), ("", "auto"), ("9", "auto")):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert clipfilter1._ask_for_device("auto") == expected
    assert "1. cpu\n2. cuda:0\n3. cuda:1" in capsys.readouterr().out
