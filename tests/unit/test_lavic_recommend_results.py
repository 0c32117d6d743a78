"""The figures of recommendations against counting by hand."""

from __future__ import annotations

import json

import pytest

from lavic.src.recommend.data import Conversation
from lavic.src.recommend.results import (
    counts_of,
    metrics_of,
    outcome_of,
    read_summary,
    recommended_in,
    references,
    write_answers,
    write_summary,
)


def talk(gt_items, candidates):
    return Conversation("c", tuple(gt_items), tuple(candidates), {"context": "语"})


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B000000001", "B000000001"),
        (" I recommend B000000002.", "B000000002"),
        ('"0312345678", of course', "0312345678"),
        ("B00000000X: a lamp", "B00000000X"),  # an id, but no candidate
        ("odd-id, please", "odd-id"),
        ("<B000000001>", "B000000001"),
        ("nothing suits", ""),
        ("", ""),
        ("b000000001", ""),
    ],
)
def test_the_recommended_id_is_found_in_what_was_said(response, expected):
    candidates = ["B000000001", "B000000002", "0312345678", "odd-id"]
    assert recommended_in(response, candidates) == expected


def test_the_figures_are_those_of_counting_by_hand():
    talks = [
        talk(["A"], ["A", "B"]),  # hit
        talk(["A", "B", "C"], ["A", "D"]),  # hit: one true id of three
        talk(["A", "A"], ["A", "B"]),  # hit: listed twice, it counts twice
        talk(["A"], ["A", "B"]),  # a wrong candidate
        talk(["A"], ["C", "D"]),  # out of reach, a candidate said
        talk(["A"], ["C", "D"]),  # out of reach, the true one said all the same
        talk([], ["C", "D"]),  # nothing is true here; nothing said
    ]
    said = ["A", "A", "A", "B", "C", "A", ""]
    assert metrics_of(talks, said) == {
        "recall@1": 5 / 9,
        "hit_ratio@1": 4 / 6,
        "validity@1": 5 / 7,
        "recall_ceiling@1": 5 / 9,
        "hit_ratio_ceiling@1": 4 / 6,
        "hit_if_reachable": 3 / 4,
        "recall_distinct@1": 4 / 8,
    }
    assert counts_of(talks) == {"conversations": 7, "gt_items": 9, "reachable": 4}


def test_of_nothing_every_figure_is_zero():
    assert set(metrics_of([], []).values()) == {0.0}


def test_guessing_and_the_most_popular_candidate_are_counted_by_hand():
    talks = [
        talk(["A"], ["B", "A"]),  # drawn: 1/2; B is the more popular
        talk(["B"], ["A", "B", "C", "D"]),  # 1/4, and right
        talk(["A", "A", "C"], ["A", "C", "D"]),  # 3/3; C is as popular as A, which comes first
        talk(["A"], ["C", "D"]),  # out of reach
    ]
    answers = ["B", "B", "A", "C", "B"]
    assert references(talks, answers) == {"chance": (1 / 2 + 1 / 4 + 1) / 6, "majority": 3 / 6}
    assert references([], answers) == {"chance": 0.0, "majority": 0.0}


@pytest.mark.parametrize(
    ("kind", "suffix"), [("candidates_st", "st"), ("candidates_gpt_large", "gpt_large")]
)
def test_answers_stand_beside_what_the_file_says(tmp_path, kind, suffix):
    path = tmp_path / "test_results.jsonl"
    write_answers(path, kind, outcome_of([talk(["A"], ["A"])], ["It is A"]))
    text = path.read_text(encoding="utf-8")
    assert "语" in text
    assert json.loads(text) == {
        "context": "语",
        f"recommended_{suffix}": "A",
        f"response_{suffix}": "It is A",
    }


def test_the_summary_grows_by_a_line_a_run_with_the_documented_columns_first(tmp_path):
    row = {"model_dir": "m, n", "candidate_type": "candidates_st", "recall@1": 0.25}
    write_summary(tmp_path, [row])
    path = write_summary(tmp_path, [*read_summary(tmp_path), row | {"recall@1": 0.5}])
    lines = path.read_text().splitlines()
    documented = (
        "model_dir,candidate_type,lr,weight_decay,num_epochs,recall@1,validity@1,output_file"
    )
    assert lines[0].startswith(documented + ",")
    assert lines[1].startswith('"m, n",candidates_st,,,,0.25,')
    assert [found["recall@1"] for found in read_summary(tmp_path)] == ["0.25", "0.5"]
    assert read_summary(tmp_path / "nowhere") == []
