"""Products and conversations: what is read, left out and refused; requests; the figures by hand."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lavic.src.catalogue import (
    Picture,
    Sample,
    choose,
    read_pictures,
    read_samples,
    read_titles,
)
from lavic.src.recommend.data import Conversation, read_conversations, with_answers
from lavic.src.recommend.results import counts_of, metrics_of, recommended_in, references
from lavic.src.vision.training import Best
from shared.errors import UserError

VALID_ROW = {
    "title": "桌牌 ✨",
    "image_name": "B0_1.jpg",
    "image": "https://images.example/B0_1.jpg",
    "image_description_llava_cleaned": "一个红色的圆 🔴",
}
TALK: dict[str, Any] = {
    "context": "<submission>Need a lamp — 灯 💡</submission>\n<comment>Try</comment>\n",
    "context_items": ["B000000009"],
    "gt": "B000000001 is nice",
    "gt_items": ["B000000001"],
    "candidates_st": ["B000000002", "0312345678"],
    "candidates_gpt_large": ["B000000001", "B000000003"],
}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("B0_0.jpg", "B0_1.jpg", "0486_0.jpg"):
        (folder / name).write_bytes(b"x")
    return folder


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def train_file(tmp_path, **changes):
    items = {
        "B0": {
            "title": "Sign",
            "images": [{"large": "https://images.example/1"}],
            "image_descriptions_llava_cleaned": {"B0_0.jpg": "A.", "B0_1.jpg": "B."},
        },
        "0486": {"image_descriptions_llava_cleaned": {"0486_0.jpg": "C.", "0486_7.jpg": "D."}},
    }
    return write(tmp_path / "item2meta_train.json", items | changes)


# --- products -------------------------------------------------------------------------------------


def test_the_dictionary_form_gives_a_sample_a_picture_in_the_files_order(tmp_path, images):
    found = read_samples(train_file(tmp_path), images)
    assert found.usable == [
        Sample("Sign", images / "B0_0.jpg", "A."),
        Sample("Sign", images / "B0_1.jpg", "B."),
        Sample("No Title", images / "0486_0.jpg", "C."),
    ]
    assert found.missing == ["0486_7.jpg"]
    assert found.summary(images) == f"3 samples; 1 more have no picture in {images} (0486_7.jpg)"
    assert read_titles(train_file(tmp_path)) == {"B0": "Sign", "0486": "No Title"}


def test_fault_32_marks_of_editors_and_blank_lines_are_no_errors(tmp_path, images):
    path, line = tmp_path / "v.jsonl", json.dumps(VALID_ROW, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n   \n" + line)
    sample = Sample("桌牌 ✨", images / "B0_1.jpg", "一个红色的圆 🔴")
    assert read_samples(path, images).usable == [sample, sample]
    assert read_titles(path) == {"B0": "桌牌 ✨"}
    assert read_pictures("valid", path) == [
        Picture("valid", "B0_1.jpg", "https://images.example/B0_1.jpg")
    ]


def test_the_pictures_of_an_item_are_numbered_as_they_stand(tmp_path):
    images = [{"large": "http://a/1.jpg"}, {"large": None}, {"large": "http://a/3.jpg"}]
    items = {"0312345678": {"images": images}, "B1": {}, "B2": {"images": None}, "书": None}
    path = tmp_path / "items.json"
    path.write_text("\ufeff" + json.dumps(items), encoding="utf-8")
    found = read_pictures("train", path)
    assert [picture.name for picture in found] == [f"0312345678_{n}.jpg" for n in range(3)]
    assert [picture.problem for picture in found] == [None, "it has no http address", None]


def samples(path: Path) -> object:
    return read_samples(path, path.parent / "images")


def pictures(path: Path) -> object:
    return read_pictures("train", path)


def talks(path: Path) -> object:
    return read_conversations(path, "candidates_st")


def described(texts: object) -> str:
    return json.dumps({"B0": {"image_descriptions_llava_cleaned": texts}})


def changed(**changes: object) -> str:
    return json.dumps(TALK) + "\n" + json.dumps(TALK | changes)


BAD: list[tuple[Any, str, str | bytes | None, str]] = [
    (samples, "a.jsonl", json.dumps(VALID_ROW) + "\n{not json\n", "a.jsonl line 2 is no JSON"),
    (samples, "a.jsonl", "[1, 2]", "a.jsonl line 1 holds a list"),
    (samples, "a.jsonl", '\n{"title": "a"}', "line 2: no text under 'image_name' (keys there: t"),
    (samples, "a.jsonl", '{"image_name": "B0_0.jpg"}', "'image_description_llava_cleaned'"),
    (samples, "a.jsonl", b'\xff\xfe{"a": 1}\n', "a.jsonl line 1 is no UTF-8 text"),
    (samples, "a.json", '{"B0": {\n"title": "a",\n', "a.json line 3 is no JSON"),
    (samples, "a.json", "[]", "holds a list, expected one dictionary of items"),
    (samples, "a.json", '{"B0": "x"}', "item B0: a str, expected a dictionary"),
    (samples, "a.json", described(["x"]), "must map pictures to texts"),
    (samples, "a.json", described({"B0_0.jpg": 3}), "the description of B0_0.jpg is no text"),
    (samples, "a.json", '{"B0": "é"}'.encode("latin-1"), "not UTF-8"),
    (samples, "a.json", "{}", "describes 0 pictures"),
    (samples, "a.json", described({"B1_0.jpg": "A."}), "the first is B1_0.jpg"),
    (pictures, "a.csv", "x", "end in .json"),
    (talks, "a.jsonl", None, "a.jsonl is missing"),
    (talks, "a.jsonl", "\n\n", "holds no conversation"),
    (talks, "a.jsonl", '{"gt_items": []}', "line 1: no text under 'context'"),
    (talks, "a.jsonl", changed(gt_items="B1"), "line 2: no list of ids under 'gt_items'"),
    (talks, "a.jsonl", changed(candidates_st=[1]), "no list of ids under 'candidates_st'"),
    (talks, "a.jsonl", changed(candidates_st=[]), "candidates_st is empty"),
    (talks, "a.jsonl", changed(candidates_st=[" "]), "holds an id that is empty"),
    (talks, "a.jsonl", changed(gt_items=["buy this"]), "white space in it"),
]


@pytest.mark.parametrize(("read", "name", "content", "message"), BAD)
def test_a_bad_item_file_is_named_with_its_line(tmp_path, images, read, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_a_description_without_words_is_counted_and_left_out(tmp_path, images):
    blank = {"image_descriptions_llava_cleaned": {"B0_0.jpg": "  "}}
    found = read_samples(train_file(tmp_path, B0=blank), images)
    assert [sample.description for sample in found.usable] == ["C."]
    assert found.wordless == ["B0_0.jpg"] and "1 more have no words" in found.summary(images)


def test_fault_34_a_name_is_a_plain_file_of_the_folder_or_nothing(tmp_path, images):
    (tmp_path / "outside.jpg").write_bytes(b"x")
    (images / "images").mkdir()
    strange = "-a b'\"$(touch Y);桌.jpg"
    (images / strange).write_bytes(b"x")
    gone = ["../outside.jpg", "/etc/passwd", "", ".", "images", "$(touch X).jpg", "-rf.jpg"]
    entry = {"image_descriptions_llava_cleaned": dict.fromkeys([*gone, strange], "A.")}
    found = read_samples(train_file(tmp_path, B9=entry), images)
    assert found.missing == ["0486_7.jpg", *gone]
    assert len(found.usable) == 4 and found.usable[-1].image_path.name == strange


def test_the_first_samples_are_taken_or_as_many_at_random_in_order():
    everything = [Sample(str(n), Path(f"{n}.jpg"), "x") for n in range(50)]
    assert choose(everything, None, None) == choose(everything, 99, 3) == everything
    assert choose(everything, 5, None) == everything[:5]
    drawn = choose(everything, 5, 1)
    numbers = [int(sample.title) for sample in drawn]
    assert len(set(numbers)) == 5 and numbers == sorted(numbers) and numbers != [0, 1, 2, 3, 4]
    assert choose(everything, 5, 1) == drawn != choose(everything, 5, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fault_17_a_validation_that_is_not_finite_is_never_the_best(bad):
    best = Best()
    assert not best.update(bad, 1) and best.epoch == 0
    assert best.update(2.0, 2) and not best.update(bad, 3) and not best.update(2.0, 4)
    assert (best.loss, best.epoch) == (2.0, 2)
    again = Best()
    again.load_state_dict(best.state_dict())
    assert not again.update(bad, 4) and not again.update(2.5, 5) and again.update(1.5, 6)


# --- conversations --------------------------------------------------------------------------------


def talk(gt_items, candidates):
    return Conversation("c", tuple(gt_items), tuple(candidates), {})


@pytest.mark.parametrize("kind", ["candidates_st", "candidates_gpt_large"])
def test_both_kinds_of_candidates_are_read_with_the_contexts_marks(tmp_path, kind):
    (found,) = read_conversations(write(tmp_path / "a.jsonl", TALK), kind)
    assert found.context == TALK["context"]
    assert found.gt_items == ("B000000001",) and found.row == TALK
    assert list(found.candidates) == TALK[kind]
    assert found.reachable is (kind == "candidates_gpt_large")


def test_a_candidate_that_stands_twice_counts_once_and_true_ids_stay_as_listed(tmp_path):
    twice = ["B1", "B2", "B1"]
    path = write(tmp_path / "a.jsonl", TALK | {"candidates_st": twice, "gt_items": twice})
    (found,) = read_conversations(path, "candidates_st")
    assert (found.candidates, found.gt_items) == (("B1", "B2"), tuple(twice))
    assert [request.answer for request in with_answers([found], 0)] == twice


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
    assert before.candidates == ("F1", "T2", "F2", "F3")
    many = [talk(["T", "G"], ["F1", "G", "F2", "F3"])] * 400
    found, again, other = (with_answers(many, seed)[::2] for seed in (0, 0, 1))
    assert found == again != other  # the same every time, and even over the conversations
    places = Counter(request.candidates.index("T") for request in found)
    assert places.keys() == {0, 2, 3}  # the other true one stays
    assert all(100 <= count <= 170 for count in places.values()), places


# --- how good recommendations are -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "expected"),
    [
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
