"""Product files of both schemas: what is read, what is left out, what is refused and where."""

import json
from pathlib import Path

import pytest

from lavic.src.catalogue import Sample, choose, most, read_samples, read_titles
from lavic.src.vision.training import SameData
from shared.errors import UserError

VALID_ROW = {
    "title": "桌牌 ✨",
    "image_name": "B0_1.jpg",
    "image": "https://images.example/B0_1.jpg",
    "image_description_llava_cleaned": "一个红色的圆 🔴",
}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("B0_0.jpg", "B0_1.jpg", "0486_0.jpg"):
        (folder / name).write_bytes(b"x")
    return folder


def write(path: Path, content: object, *, encoding="utf-8", newline="\n") -> Path:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_text(text, encoding=encoding, newline=newline)
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


def test_the_dictionary_form_gives_a_sample_a_picture_in_the_files_order(tmp_path, images):
    found = read_samples(train_file(tmp_path), images)
    assert found.usable == [
        Sample("Sign", images / "B0_0.jpg", "A."),
        Sample("Sign", images / "B0_1.jpg", "B."),
        Sample("No Title", images / "0486_0.jpg", "C."),
    ]
    assert found.missing == ["0486_7.jpg"]
    assert found.summary(images) == f"3 samples; 1 more have no picture in {images} (0486_7.jpg)"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_fault_32_marks_of_editors_and_blank_lines_are_no_errors(
    tmp_path, images, encoding, newline
):
    line = json.dumps(VALID_ROW, ensure_ascii=False)
    path = write(tmp_path / "v.jsonl", f"{line}\n\n   \n", encoding=encoding, newline=newline)
    found = read_samples(path, images)
    assert found.usable == [Sample("桌牌 ✨", images / "B0_1.jpg", "一个红色的圆 🔴")]


BAD_LINES = {
    "no JSON": ("{not json", "line 2 is no JSON"),
    "cut off": ('{"title": "a", "image_na', "line 2 is no JSON"),
    "no object": ("[1, 2]", "line 2 holds a list"),
    "no picture": ('{"title": "a"}', "line 2: no text under 'image_name' (keys there: title)"),
    "a number as picture": ('{"image_name": 3}', "line 2: no text under 'image_name'"),
    "no description": ('{"image_name": "B0_0.jpg"}', "'image_description_llava_cleaned'"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_fault_32_a_bad_line_is_named_with_file_and_number(tmp_path, images, line, message):
    path = write(tmp_path / "v.jsonl", json.dumps(VALID_ROW) + "\n" + line + "\n")
    with pytest.raises(UserError) as error:
        read_samples(path, images)
    assert str(path) in str(error.value) and message in str(error.value)


BAD_DICTIONARIES = {
    "cut off": ('{"B0": {\n"title": "a",\n', "line 3 is no JSON"),
    "a list": ("[]", "holds a list, expected one dictionary of items"),
    "an item that is a text": ('{"B0": "x"}', "item B0: a str, expected a dictionary"),
    "descriptions in a list": (
        '{"B0": {"image_descriptions_llava_cleaned": ["x"]}}',
        "item B0: image_descriptions_llava_cleaned must map pictures to texts",
    ),
    "a description that is a number": (
        '{"B0": {"image_descriptions_llava_cleaned": {"B0_0.jpg": 3}}}',
        "item B0: the description of B0_0.jpg is no text",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD_DICTIONARIES.values(), ids=BAD_DICTIONARIES)
def test_fault_32_a_bad_dictionary_is_named_with_the_item(tmp_path, images, text, message):
    path = write(tmp_path / "t.json", text)
    with pytest.raises(UserError, match=r"t.json") as error:
        read_samples(path, images)
    assert message in str(error.value)


def test_bytes_that_are_no_utf8_are_refused(tmp_path, images):
    path = tmp_path / "t.json"
    path.write_bytes('{"B0": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"not UTF-8"):
        read_samples(path, images)


def test_fault_29_a_file_without_a_usable_sample_is_refused(tmp_path, images):
    empty = write(tmp_path / "t.json", {})
    with pytest.raises(UserError, match=r"describes 0 pictures"):
        read_samples(empty, images)
    with pytest.raises(UserError, match=r"the first is B1_0.jpg"):
        read_samples(
            write(empty, {"B1": {"image_descriptions_llava_cleaned": {"B1_0.jpg": "A."}}}), images
        )


def test_a_description_without_words_is_counted_and_left_out(tmp_path, images):
    blank = {"image_descriptions_llava_cleaned": {"B0_0.jpg": "  "}}
    found = read_samples(train_file(tmp_path, B0=blank), images)
    assert [sample.description for sample in found.usable] == ["C."]
    assert found.wordless == ["B0_0.jpg"] and "1 more have no words" in found.summary(images)


NAMES = ["../outside.jpg", "/etc/passwd", "", ".", "images", "$(touch X).jpg", "-rf.jpg"]


@pytest.mark.parametrize("name", NAMES)
def test_fault_34_a_name_is_a_plain_file_of_the_folder_or_nothing(tmp_path, images, name):
    (tmp_path / "outside.jpg").write_bytes(b"x")
    (images / "images").mkdir()
    entry = {"image_descriptions_llava_cleaned": {name: "A."}}
    found = read_samples(train_file(tmp_path, B9=entry), images)
    assert name in found.missing and len(found.usable) == 3


def test_fault_34_strange_names_that_are_there_are_read(tmp_path):
    images = tmp_path / "数据 集" / "$(touch X)'\""
    images.mkdir(parents=True)
    name = "-a b'\"$(touch Y);桌.jpg"
    (images / name).write_bytes(b"x")
    path = write(tmp_path / "t.json", {"B": {"image_descriptions_llava_cleaned": {name: "A."}}})
    assert [s.image_path.name for s in read_samples(path, images).usable] == [name]
    assert {p.name for p in tmp_path.iterdir()} == {"数据 集", "t.json"}


def test_titles_are_found_by_item_in_both_forms(tmp_path):
    assert read_titles(train_file(tmp_path)) == {"B0": "Sign", "0486": "No Title"}
    path = write(tmp_path / "v.jsonl", json.dumps(VALID_ROW))
    assert read_titles(path) == {"B0": "桌牌 ✨"}


def samples_of(count):
    return [Sample(str(n), Path(f"{n}.jpg"), "x") for n in range(count)]


def test_the_first_samples_are_taken_or_as_many_at_random_in_order():
    samples = samples_of(50)
    assert choose(samples, None, None) == choose(samples, 99, 3) == samples
    assert choose(samples, 5, None) == samples[:5]
    drawn = choose(samples, 5, 1)
    numbers = [int(sample.title) for sample in drawn]
    assert len(set(numbers)) == 5 and numbers == sorted(numbers) and numbers != [0, 1, 2, 3, 4]
    assert choose(samples, 5, 1) == drawn != choose(samples, 5, 2)


def test_a_run_does_not_go_on_with_other_samples():
    state = SameData("samples", map(str, range(3))).state_dict()
    SameData("samples", map(str, range(3))).load_state_dict(state)
    with pytest.raises(ValueError, match=r"3 training samples then, 4 now"):
        SameData("samples", map(str, range(4))).load_state_dict(state)


@pytest.mark.parametrize(("text", "expected"), [("all", None), ("1", 1), ("5000", 5000)])
def test_a_limit_of_samples_is_a_number_or_all(text, expected):
    assert most(text) == expected


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "", "²"])
def test_any_other_limit_of_samples_is_refused(text):
    with pytest.raises(UserError, match=f"from 1 to 2,147,483,647, got '?{text}'?$"):
        most(text)
