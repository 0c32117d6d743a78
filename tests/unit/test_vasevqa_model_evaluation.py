"""Scores of answers, against counts by hand; what a conversation looks like to a chat template."""

from __future__ import annotations

import pytest

from vasevqa.demo_data import questions
from vasevqa.demo_data.vases import make_vases
from vasevqa.model import evaluation, rows


def row(question, answer, number=1, **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return rows.parse({"images": ["a.jpg"], "conversations": turns, **more}, number)


def test_accuracy_is_counted_over_all_and_for_each_attribute():
    asked = [
        row("<image>What is the shape?", "krater"),
        row("<image>What is the shape?", "hydria"),
        row("<image>?", "Star Painter", attribute="attribution"),
        row("<image>How many handles?", "two"),
    ]
    answers = ["krater", "a Hydria", "<answer>Ring Painter</answer>", "three"]
    metrics, counts = evaluation.score(asked, answers)
    assert counts == {"questions": 4, "shape": 2, "attribution": 1, "other": 1}
    assert metrics["exact"] == 1 / 4 and metrics["exact/shape"] == 1 / 2
    assert metrics["normalised"] == 2 / 4 and metrics["normalised/shape"] == 1.0
    # 1 + 1 + 2·1/(2+2) + 0 of 4
    assert metrics["credit"] == pytest.approx(2.5 / 4)
    assert metrics["credit/attribution"] == 0.5 and metrics["normalised/other"] == 0.0


def test_an_answer_with_words_around_it_is_right_in_content():
    asked = [row("<image>What is the shape?", "krater"), row("<image>When?", "550-500 BC")]
    answers = ["A krater, it seems.", "550-50 BC or so."]
    metrics, _ = evaluation.score(asked, answers)
    assert (metrics["exact"], metrics["normalised"], metrics["contained"]) == (0, 0, 0.5)


def test_chance_guesses_among_an_attributes_answers_and_the_majority_is_its_most_frequent():
    answers = {"shape": ["krater", "Krater", "hydria"], "date": ["550 BC", "500 BC"]}
    asked = [row("<image>?", text, attribute=a) for a, texts in answers.items() for text in texts]
    assert evaluation.majority(asked) == pytest.approx((2 + 1) / 5)
    assert evaluation.chance(asked) == pytest.approx((3 / 2 + 2 / 2) / 5)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (row("Which Technique is it?", "x"), "technique"),
        (row("When?", "x", attribute="Date"), "date"),
        (row("What is the shape?", "x", attribute="era"), "era"),
        (row("Who?", "x"), "other"),
    ],
)
def test_what_a_row_asks_about(asked, name):
    assert evaluation.attribute_of(asked) == name


def test_pictures_are_where_their_tags_are_and_the_answer_is_left_out():
    made = evaluation.messages(row("Look: <image>\nWhat?", "krater"), "Be brief.")
    assert made == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look: "},
                {"type": "image"},
                {"type": "text", "text": "\nWhat?"},
            ],
        },
    ]
    # without a tag pictures come first, as in training
    made = evaluation.messages(row("What?", "krater"), None)
    assert made[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]


def test_demo_rows_are_right_for_training_and_for_grpo():
    vases = make_vases(3, seed=1)
    made = list(questions.make_rows(vases, evaluation.Path("vases"), seed=1))
    assert len(made) == 21
    answers = {vase.id: vase.attributes for vase in vases}
    for source, for_grpo in zip(made, questions.with_solutions(made), strict=True):
        parsed = rows.parse(source, 1)
        rows.check(parsed, is_grpo=False)
        vase = evaluation.Path(parsed.images[0]).name.partition("_")[0]
        assert parsed.answer == answers[vase][evaluation.attribute_of(parsed)]
        rows.check(rows.parse(for_grpo, 1), is_grpo=True)
        assert not rows.parse(for_grpo, 1).answer and for_grpo["solution"] == parsed.answer
