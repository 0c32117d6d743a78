"""Conversations as they come, and the requests made of them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from lavic.src.recommend.data import Conversation, as_asked, read_conversations, with_answers
from shared.errors import UserError

ROW: dict[str, Any] = {
    "context": "<submission>Need a lamp — 灯 💡</submission>\n<comment>Try</comment>\n",
    "context_items": ["B000000009"],
    "gt": "B000000001 is nice",
    "gt_items": ["B000000001"],
    "candidates_st": ["B000000002", "0312345678"],
    "candidates_gpt_large": ["B000000001", "B000000003"],
}


def write(path, *rows, **changes):
    lines = [json.dumps(row | changes, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def talk(gt_items, candidates, context="c"):
    return Conversation(context, tuple(gt_items), tuple(candidates), {})


@pytest.mark.parametrize("kind", ["candidates_st", "candidates_gpt_large"])
def test_both_kinds_of_candidates_are_read_with_the_contexts_marks(tmp_path, kind):
    (found,) = read_conversations(write(tmp_path / "a.jsonl", ROW), kind)
    assert found.context == ROW["context"]
    assert found.gt_items == ("B000000001",) and found.row == ROW
    assert list(found.candidates) == ROW[kind]
    assert found.reachable is (kind == "candidates_gpt_large")


def test_marks_of_editors_and_blank_lines_are_no_errors(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(ROW, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n  \r\n")
    first, second = read_conversations(path, "candidates_st")
    assert first == second and first.context == ROW["context"]


def test_a_candidate_that_stands_twice_counts_once_and_true_ids_stay_as_listed(tmp_path):
    twice = ["B1", "B2", "B1"]
    path = write(tmp_path / "a.jsonl", ROW, candidates_st=twice, gt_items=twice)
    (found,) = read_conversations(path, "candidates_st")
    assert (found.candidates, found.gt_items) == (("B1", "B2"), tuple(twice))
    assert [request.answer for request in with_answers([found], 0)] == twice


BAD = {
    "torn": ('{"context": "a', "line 2 is no JSON"),
    "no context": (json.dumps({"gt_items": []}), r"line 2: no text under 'context'"),
    "no list": (json.dumps(ROW | {"gt_items": "B1"}), "line 2: no list of ids under 'gt_items'"),
    "numbers": (json.dumps(ROW | {"candidates_st": [1]}), "no list of ids under 'candidates_st'"),
    "no candidates": (json.dumps(ROW | {"candidates_st": []}), "candidates_st is empty"),
    "an empty id": (json.dumps(ROW | {"candidates_st": [" "]}), "holds an id that is empty"),
    "a sentence": (json.dumps(ROW | {"gt_items": ["buy this"]}), "white space in it"),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line, message):
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_conversations(path, "candidates_st")
    assert "talks.jsonl" in str(caught.value)


def test_a_missing_and_an_empty_file_are_named(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        read_conversations(tmp_path / "a.jsonl", "candidates_st")
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no conversation"):
        read_conversations(tmp_path / "a.jsonl", "candidates_st")


def test_there_is_a_request_for_every_true_item():
    talks = [talk(["B1", "B2"], ["B1", "B2", "B3"]), talk([], ["B1"]), talk(["B3"], ["B3"])]
    assert [(r.answer, r.candidates) for r in with_answers(talks, 0)] == [
        ("B1", ("B1", "B2", "B3")),
        ("B2", ("B1", "B2", "B3")),
        ("B3", ("B3",)),
    ]


def test_a_true_item_that_is_no_candidate_takes_the_place_of_a_false_one():
    before = talk(["T1", "T2"], ["F1", "T2", "F2", "F3"])
    first, second = with_answers([before], 7)
    assert second.candidates == before.candidates  # T2 was there
    changed = [n for n in range(4) if first.candidates[n] != before.candidates[n]]
    assert len(changed) == 1 and first.candidates[changed[0]] == "T1"
    assert changed != [1]  # the other true one stays
    assert before.candidates == ("F1", "T2", "F2", "F3")


def test_the_place_is_the_same_every_time_and_even_over_conversations():
    talks = [talk(["T"], ["F1", "F2", "F3", "F4"]) for _ in range(400)]
    first, again, other = (with_answers(talks, seed) for seed in (0, 0, 1))
    assert first == again != other
    places = Counter(request.candidates.index("T") for request in first)
    assert all(70 <= places[place] <= 130 for place in range(4)), places


def test_the_tests_requests_are_as_users_ask_them():
    (request,) = as_asked([talk(["T"], ["F1", "F2"])])
    assert request.candidates == ("F1", "F2") and request.answer is None
