"""Rewards for answers about vases, against figures worked out by hand."""

from __future__ import annotations

import sys

import pytest

from vasevqa.model import rewards
from vasevqa.model.dates import years
from vasevqa.model.plugin import plugin
from vasevqa.model.rewards import answer_in, credit, has_format, is_exact, is_same


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("Red-Figure.", "red figure"),
        ("the lekythos", "Lekythos"),
        ("It is Athenian", "attic"),
        ("ΑΒ Krater", "αβ crater"),
        ("Ｂｌａｃｋ-figure", "black figure"),
        ("红绘", "red-figure"),
        ("550 – 500 B.C.", "550-500 BCE"),
        ("Star Painter", "attributed to the star painter"),
        ("oenochoé", "oinochoe"),
        ("two handles", "two handle"),
        ("c. 480 BC", "480 v. Chr."),
    ],
)
def test_two_ways_of_writing_mean_the_same(answer, reference):
    assert is_same(answer, reference) and credit(answer, reference) == 1.0


def test_what_means_something_else_is_not_the_same():
    assert not is_same("red-figure", "black-figure")
    assert not is_same("", "") and not is_same("of the", "an")
    assert is_exact(" amphora\n", "amphora") and not is_exact("Amphora", "amphora")


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        # words shared, doubled, over words in both: 2·1/(2+2), 2·1/(1+2), none
        ("Ring Painter", "Star Painter", 0.5),
        ("Painter", "Star Painter", 2 / 3),
        ("hydria", "amphora", 0.0),
        ("", "amphora", 0.0),
        # every word counts as often as the reference has it: 2·1/(3+1)
        ("amphora amphora amphora", "amphora", 0.5),
        # years of both over years of either: 51 of 101 (550…450), 1 of 101
        ("550-500 BC", "550-450 BC", 51 / 101),
        ("500-450 BC", "550-500 BC", 1 / 101),
        ("480 BC", "500-451 BC", 1 / 50),
        ("550-500 AD", "550-500 BC", 0.0),
        ("old", "550-500 BC", 0.0),
    ],
)
def test_a_part_of_the_answer_earns_a_part(answer, reference, expected):
    assert credit(answer, reference) == pytest.approx(expected)


# The least and the most credit that common sense gives.
BOUNDS = (
    ("unknown", "550-500 BC", 0, 0),
    ("6th century BC", "550-500 BC", 0.3, 0.6),
    ("-500 to -450", "500-450 BC", 0.9, 1),
    ("sixth century", "6th century BC", 1, 1),
    ("second half of the 6th century BC", "600-550 BC", 0, 0.1),
    ("mid-5th century BC", "475-425 BC", 0.5, 1),
    ("ITALY, ETRURIA, VULCI", "Vulci", 0.4, 0.9),
    ("no", "no", 1, 1),
    ("Painter of Berlin 1686", "Painter of Berlin 1700", 0.3, 0.9),
    ("Group C", "Group D", 0, 0.6),
    ("Type A", "Type B", 0, 0.6),
    ("500-450 BC", "500-450", 0.9, 1),
    ("480", "480 BC", 1, 1),
    ("450-500", "500-450 BC", 0, 1),
    ("Attributed to the Berlin Painter", "BERLIN P by BEAZLEY", 0.3, 1),
    ("neck amphora", "AMPHORA, NECK", 0.9, 1),
    ("550-500 BC, Athenian", "550-500 BC", 0.8, 1),
    ("550-500 or 480-470 BC", "550-500 BC", 0.7, 0.95),
    ("550-500 BC", "500-550 AD", 0, 0),
    ("RF", "red-figure", 1, 1),
    ("RF", "BF", 0, 0.6),
    ("lekythoi", "lekythos", 1, 1),
    ("kylikes", "kylix", 1, 1),
    ("It is not red-figure", "red-figure", 0, 0),
    ("isn't Athenian", "Athenian", 0, 0),
    ("red-figure", "not red-figure", 0, 0),
    ("the 5th century", "450 BC", 0, 0.05),
    ("2159", "480 BC", 0, 0),
    ("Late Archaic", "late 6th century BC", 0, 0.5),
)


@pytest.mark.parametrize(("answer", "reference", "least", "most"), BOUNDS)
def test_credit_is_what_common_sense_gives(answer, reference, least, most):
    assert least <= credit(answer, reference) <= most


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("2nd century AD", (101, 200)),
        ("120 AD", (120, 120)),
        ("last quarter of the 2nd century AD", (176, 200)),
        ("Late Geometric, 8th century BC", (-800, -701)),
        ("the 550s BC", (-559, -550)),
        ("120-30 AD", (120, 130)),
        ("500-450", (-500, -450)),
        ("−525/−475", (-525, -475)),
        ("50 BC - AD 50", (-50, 50)),
        ("AD 50-100", (50, 100)),
        ("VI sec. a.C.", (-600, -501)),
        ("6. Jh. v. Chr.", (-600, -501)),
        ("V-IV secolo a.C.", (-500, -301)),
        ("late 6th to early 5th c. B.C.", (-533, -468)),
        ("mid- to late 5th century BC", (-475, -401)),
        ("6th century BC, second half", (-550, -501)),
        ("公元前550年至前500年", (-550, -500)),
        ("公元二世纪", (101, 200)),
        ("London E 440; about 480 BC", (-480, -480)),
        ("480/79 BC", (-480, -479)),
        ("560s-550s BC", (-569, -550)),
        ("AD50", (50, 50)),
        ("Painter of Berlin 1686", (1686, 1686)),
        ("31.5 cm high, 480 BC", (-480, -480)),
        ("6th c. BCE (late)", (-533, -501)),
        ("second century BC to first century AD", (-200, 100)),
        ("last third of the 5th century BC", (-433, -401)),
        ("première moitié du Ve siècle av. J.-C.", (-500, -451)),
        ("公元前6世纪末至5世纪初", (-533, -468)),
        ("c. 480", (480, 480)),
        ("century VI BC", (-600, -501)),
        (f"{'9' * 5000}th century BC", None),
    ],
)
def test_dates_are_read_as_years(text, span):
    found = years(text)
    assert ((min(found), max(found)) if found else None) == span


@pytest.mark.parametrize(
    ("text", "answer", "in_form"),
    [
        ("<answer>krater</answer>", "krater", True),
        ("<think>tall</think>\n<answer> krater </answer>", "krater", True),
        ("<think>tall</think> krater", "krater", False),
        ("krater", "krater", False),
        ("<answer>krater", "krater", False),
        ("<answer></answer>", "", False),
        ("<answer>a</answer><answer>b</answer>", "a", False),
        ("well: <answer>krater</answer>", "krater", False),
        ("<think>never ends", "", False),
    ],
)
def test_the_answer_and_the_form_of_a_completion(text, answer, in_form):
    assert answer_in(text) == answer
    assert has_format(text) is in_form


def test_the_documented_function_takes_responses_and_references():
    responses = ["<think>dark</think><answer>Black figure</answer>", "Ring Painter", "krater"]
    references = ["black-figure", "Star Painter", "kylix"]
    assert plugin.external_vase_acc(responses, references) == [1.0, 0.5, 0.0]
    assert plugin.external_vase_format(responses, references) == [1.0, 0.0, 0.0]


def test_every_attribute_of_a_vase_is_scored_in_full_and_against_another():
    examples = {
        "fabric": ("Attic", "Corinthian"),
        "technique": ("red-figure", "white-ground"),
        "shape": ("hydria", "lekythos"),
        "provenance": ("Athens", "Vulci"),
        "date": ("550-500 BC", "450-400 BC"),
        "attribution": ("Star Painter", "unattributed"),
        "decoration": ("star", "checked"),
    }
    assert tuple(examples) == rewards.ATTRIBUTES
    for right, wrong in examples.values():
        assert credit(right, right) == 1.0
        assert credit(wrong, right) == 0.0


@pytest.mark.slow
def test_plain_functions_of_a_users_plugin_become_rewards_of_swift(tmp_path, monkeypatch):
    from swift.rewards import ORM, orms
    from swift.utils import import_external_file

    mine = tmp_path / "mine.py"
    mine.write_text(
        "def short(responses, references):\n"
        "    return [len(a) / len(b) for a, b in zip(responses, references)]\n"
        "def helper(text):\n    return text\n"
        "def format(responses, references):\n    return [7.0] * len(responses)\n"
    )
    adapt = plugin.__file__.replace("plugin.py", "adapt.py")
    before = dict(orms)
    words = ["rlhf", "--external_plugins", str(mine), plugin.__file__, adapt, "--beta", "0"]
    monkeypatch.setattr(sys, "argv", words)
    try:
        import_external_file(adapt)
        assert {"short", "external_vase_acc", "external_vase_format"} == orms.keys() - before.keys()
        assert orms["format"] is before["format"]  # what is registered stays
        reward = orms["short"](args=None)
        assert isinstance(reward, ORM)
        assert reward(completions=["ab", "abcd"], solution=["abcd", "abcd"]) == [0.5, 1.0]
        assert reward(["ab"], caption=["abcd"], images=[[]]) == [0.5]
        with pytest.raises(ValueError, match="nothing to reward by"):
            reward(["ab"], images=[[]])
        vase = orms["external_vase_acc"]()
        assert vase(["amphora", "kylix"], solution=["Amphora", "krater"]) == [1.0, 0.0]
    finally:
        orms.clear()
        orms.update(before)
