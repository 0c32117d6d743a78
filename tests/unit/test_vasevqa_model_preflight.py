"""What is found before swift is imported: rows, pictures, weights, packages, room."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import re
import shutil
import struct
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tokenizers
from PIL import Image

from shared.errors import MissingToolError, UserError
from tests.harness import run_here
from vasevqa.model import lengths, needs, pictures, plan, preflight, rows, training_files


def turn(who, text):
    return {"from": who, "value": text}


def row(image="a.jpg", question="<image>\nWhat is it?", answer="amphora", **more):
    turns = [turn("human", question)] + ([turn("gpt", answer)] if answer is not None else [])
    return {"images": [image], "caption": "a vase", "conversations": turns, **more}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 30), (200, 90, 20)).save(tmp_path / "a.jpg")
    return tmp_path


def write(folder, content, name="train.json", encoding="utf-8"):
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_bytes(text.encode(encoding))
    return path


def opened(folder, content, *, grpo=False, **how):
    return training_files.open_file(write(folder, content, **how), [folder], is_grpo=grpo)


def problems(folder, content, *, grpo=False):
    return preflight.check_data([write(folder, content)], [folder], is_grpo=grpo).problems


# --- rows -----------------------------------------------------------------------------------------


def part(**what):
    """A user's message of one part, and its answer."""
    asked = {"role": "user", "content": [what, {"type": "text", "text": "What?"}]}
    return {"images": [], "messages": [asked, {"role": "assistant", "content": "krater"}]}


FORMS = {
    "conversations": row(answer="krater"),
    "no tag": row(question="What is it?", answer="krater"),  # swift puts pictures in front
    "parts": part(type="image", image="a.jpg"),
    "query and response": {"query": "<image>What?", "response": "krater"},
    "Alpaca": {"instruction": "<image>What?", "input": "", "output": "krater"},
    "history": {"query": "And now?", "response": "krater", "system": "You see vases.",
                "history": [["<image>What?", "an amphora"]]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_forms_that_swift_documents_are_read(form, folder):
    found = opened(folder, [{"images": ["a.jpg"], **form}])
    assert not found.problems
    (read,) = found.rows
    assert read.images == ("a.jpg",) and read.answer == "krater"
    assert found.pictures == [folder / "a.jpg"]


def test_json_lines_a_mark_and_windows_line_ends_are_read(folder):
    text = "红绘\u2028figure\u0085krater"  # a line ends at a line feed alone
    lines = "\r\n".join(json.dumps(row(answer=text), ensure_ascii=False) for _ in range(3))
    found = opened(folder, lines + "\r\n", name="train.jsonl", encoding="utf-8-sig")
    assert [each.answer for each in found.rows] == [text] * 3 and not found.problems
    assert "byte-order mark" in (training_files.needs_copy(found, None) or "")


MISTAKES = {
    "no conversations": ({"images": ["a.jpg"]}, "has no conversations"),
    "a tag too many": (row(question="<image><image> ?"), "has 1 image(s) and 2 <image> tag(s)"),
    "no answer": (row(answer="  "), "has no answer"),
    "an unknown speaker": (
        {"images": [], "conversations": [turn("robot", "x")]},
        "a turn from 'robot'; allowed: human, gpt, system",
    ),
    "a missing picture": (row(image="b.jpg"), "b.jpg is missing"),
    "a part without its picture": (part(type="image"), "has no image"),
    "a missing film": ({**row(), "videos": ["v.mp4"]}, "v.mp4 is missing"),
}
FOR_GRPO = {
    "no picture": ({**row(question="What?"), "images": []}, "has no images"),
    "nothing to reward by": ({**row(answer=None), "caption": ""}, "has nothing to reward by"),
}


@pytest.mark.parametrize("case", [*MISTAKES, *FOR_GRPO])
def test_a_row_that_cannot_be_trained_on_is_named(case, folder):
    bad, message = (MISTAKES | FOR_GRPO)[case]
    (found,) = problems(folder, [row(), bad], grpo=case in FOR_GRPO)
    assert message in found and "row 2" in found and "train.json" in found


def test_grpo_takes_a_solution_a_caption_or_an_answer(folder, tmp_path):
    without = row(answer=None)
    given = [row(), without, {**without, "caption": "", "solution": "krater"}]
    assert problems(folder, given, grpo=True) == []
    copy = training_files.write_copy(opened(folder, given, grpo=True), tmp_path / "out")
    solutions = [json.loads(line)["solution"] for line in copy.read_text().splitlines()]
    assert solutions == ["amphora", "a vase", "krater"]


def test_the_line_of_broken_json_is_named(folder):
    for name, content, said in (
        ("train.json", '[\n{"images": []},\n{"images" []}]', r"train.json, line 3: no JSON"),
        ("a.jsonl", '{}\n{"a": \n', r"a.jsonl, line 2: no JSON"),
        ("train.json", "{}\n{}\n", r"one object a line needs the ending .jsonl"),
        ("train.json", "[]", "holds no rows"),
    ):
        with pytest.raises(UserError, match=said):
            rows.read(write(folder, content, name))
    with pytest.raises(UserError, match="no UTF-8"):
        rows.read(write(folder, [row(answer="é")], encoding="latin-1"))


def test_many_mistakes_are_counted_and_a_few_named(folder):
    found = problems(folder, [row(answer=None)] * 30)
    assert len(found) == 6 and found[-1].endswith("25 more rows have such mistakes")


# --- pictures -------------------------------------------------------------------------------------


def test_pictures_are_below_the_first_root_that_holds_the_first_of_them(folder, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    path = write(folder, [row()])
    root = lambda: training_files.open_file(path, [here, there], is_grpo=False).root  # noqa: E731
    assert root() == folder  # beside the file
    for place in (there, here):
        place.mkdir()
        shutil.copy(folder / "a.jpg", place / "a.jpg")
        assert root() == place


def test_files_with_pictures_in_different_places_are_copied_with_whole_paths(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / "a.jpg", other / "a.jpg")
    paths = [write(folder, [row()]), write(other, [row()])]
    files = [training_files.open_file(path, [], is_grpo=False) for path in paths]
    flags = {"dataset": [f"{paths[0]}#1", str(paths[1])], "output_dir": [str(tmp_path / "out")]}
    ready, root = training_files.given_to_swift(plan.Plan("sft", flags), files)
    assert root is None and ready.flags["dataset"][0].endswith("#1")
    copies = [name.partition("#")[0] for name in ready.flags["dataset"]]
    images = [json.loads(Path(copy).read_text())["images"] for copy in copies]
    assert images == [[str(folder / "a.jpg")], [str(other / "a.jpg")]]


def test_a_broken_picture_is_found_by_the_sample(folder):
    (folder / "a.jpg").write_bytes((folder / "a.jpg").read_bytes()[:200])
    found = problems(folder, [row()])
    assert "row 1" in found[0] and "cannot be decoded" in found[0]
    Image.new("L", (2100, 10)).save(folder / "a.jpg")
    assert "is 2100 × 10: a side may be 200 times the other" in problems(folder, [row()])[0]


@contextlib.contextmanager
def http_server(folder):
    """The address of a server of the files in `folder`."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_addresses_are_asked_and_base64_is_read(folder):
    good = io.BytesIO()
    Image.new("RGB", (4, 4)).save(good, "PNG")
    here = "data:image/png;base64," + base64.b64encode(good.getvalue()).decode()
    bare = base64.b64encode(bytes(6000)).decode()
    with http_server(folder) as url:
        named = [f"{url}/a.jpg", here, here.partition(",")[2], f"{url}/gone.jpg", bare, "data:,x"]
        path = write(folder, [row(image=image) for image in named])
        found = preflight.check_data([path], [folder], is_grpo=False)
        preflight.check_pictures(found.files, folder / "memory.json")
    lines = found.problems
    assert [line.partition(": ")[0].rpartition(" ")[2] for line in lines] == ["4", "5", "6"]
    assert "gone.jpg answers 404" in lines[0] and "no picture in base64" in lines[1]
    assert max(map(len, lines)) < 300  # the picture itself is not printed


def test_all_pictures_are_decoded_once_and_again_when_replaced(folder, monkeypatch):
    paths = [folder / f"{number}.png" for number in range(80)]
    for path in paths:
        Image.new("L", (4, 4)).save(path)
    paths[77].write_bytes(b"<html>")
    reported: list[tuple[int, int]] = []
    look = lambda: pictures.check_all(  # noqa: E731
        paths, folder / "memory.json", lambda *counts: reported.append(counts)
    )
    seen = look()
    assert list(pictures.unusable(seen)) == [paths[77]] and reported == [(80, 80)]
    assert seen[paths[0]] == (None, [4, 4])
    paths[5].write_bytes(b"no picture")
    assert set(pictures.unusable(look())) == {paths[5], paths[77]} and reported[1:] == [(1, 1)]
    monkeypatch.setattr(pictures, "check", lambda block: pytest.fail("decoded again"))
    look()


# --- lengths --------------------------------------------------------------------------------------


def test_a_row_longer_than_max_length_is_named_by_the_models_own_tokenizer(tmp_path, folder):
    model = model_at(tmp_path / "model")
    words = {"<unk>": 0} | {word: at for at, word in enumerate(("one", "two", "krater"), 1)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(model / "tokenizer.json"))
    path = write(folder, [row(), row(answer="one two " * 100)])
    found = preflight.check_data([path], [folder], is_grpo=False)

    def check(most, **more):
        flags = {"model": [str(model)], "max_length": [str(most)]} | more
        preflight.check_lengths(plan.Plan("sft", flags), found.files, {})
        return found.problems

    assert not check(100, truncation_strategy=["right"])
    (line,) = check(100)
    assert "row 2: has 2" in line and "more than --max_length 100" in line
    count = int(line.partition("has ")[2].split()[0])
    found.files[0].bad.clear()
    assert not check(count) and len(check(count - 1)) == 1


@pytest.mark.parametrize("size", [(112, 112), (331, 7), (3000, 2000), (14, 839), (20, 20)])
def test_a_pictures_tokens_are_those_of_qwens_own_resizing(size):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    wide, high = size
    most = 1003520
    expected = smart_resize(high, wide, 28, 4 * 28 * 28, most)
    assert lengths.picture_tokens(wide, high, most) == expected[0] * expected[1] // 28**2


# --- model, rewards, packages, disk ---------------------------------------------------------------


def safetensors(path, cut=0):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8 - cut))


def model_at(path):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    return path


def why(path, grpo=False):
    return list(needs.model({"model": [str(path)]}, is_grpo=grpo))


def test_weights_that_are_missing_cut_or_pointers_are_named(tmp_path):
    model = model_at(tmp_path / "m")
    assert "holds no weights" in why(model)[0]
    safetensors(model / "model.safetensors")
    assert why(model) == []
    safetensors(model / "model.safetensors", cut=3)
    assert "bytes where its header says" in why(model)[0]
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in why(model)[0]
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    safetensors(model / "one.safetensors")
    assert why(model) == [f"{model / 'two.safetensors'} is missing: download this file again"]
    (model / "adapter_config.json").write_text("{}")
    assert "is an adapter, not a model: ./merge.sh" in why(model)[0]


def test_a_missing_model_comes_with_the_way_to_get_it(tmp_path):
    missing = tmp_path / "Qwen2.5-VL-3B-Instruct"
    assert "modelscope download --model Qwen/Qwen2.5-VL-3B-Instruct" in why(missing)[0]
    assert "run ./merge.sh after ./sft.sh" in why(tmp_path / "checkpoint-merged", grpo=True)[0]


def test_a_reward_that_no_plugin_defines_is_refused(tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text("def my_reward(responses, references):\n    return []\n")

    def wrong(*rewards):
        flags = {"external_plugins": [str(plugin)], "reward_funcs": [*rewards]}
        return "".join(needs.plugins(flags))

    assert wrong("my_reward", "format") == ""  # the second is ms-swift's
    assert "--reward_funcs vase_acc is defined nowhere" in wrong("vase_acc")
    plugin.write_text("def my_reward(responses, references)\n")
    assert "plugin.py, line 1: no Python" in wrong()
    plugin.unlink()
    assert "plugin.py is missing" in wrong()


@pytest.mark.parametrize(
    ("generations", "accumulated", "batch", "world", "fits"),
    [(4, 4, None, 1, True), (4, 1, None, 1, False), (4, 1, None, 4, True), (8, 1, 16, 1, True),
     (1, 4, None, 1, False)],
)  # fmt: skip
def test_grpo_batches_hold_whole_groups(generations, accumulated, batch, world, fits):
    flags = {"num_generations": generations, "gradient_accumulation_steps": accumulated}
    flags |= {"generation_batch_size": batch} if batch else {}
    words = {name: [str(value)] for name, value in flags.items()}
    assert (list(needs.divisible(words, world)) == []) is fits


def test_a_full_disk_and_the_file_that_ends_swifts_runs_are_refused(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert not [*needs.disk(tmp_path / "a" / "b", free // 4, 2), *needs.stop_file(tmp_path / "no")]
    assert "--save_total_limit" in next(needs.disk(tmp_path, free // 2, 2))
    assert "remove it" in next(needs.stop_file(tmp_path))


FLAGS = {
    "attn_impl flash_attn": ("flash_attn", "flash-attn --no-build-isolation, or type --attn_impl"),
    "report_to tensorboard wandb": ("wandb", "--report_to wandb needs a package that is missing"),
}


@pytest.mark.parametrize(("words", "expected"), FLAGS.items(), ids=FLAGS)
def test_a_missing_package_is_named_with_the_flag_and_what_to_do(words, expected, monkeypatch):
    module, said = expected
    monkeypatch.setattr(needs, "_is_missing", lambda name: name == module)
    name, *values = words.split()
    with pytest.raises(MissingToolError, match=re.escape(said)):
        needs.packages({name: values}, is_grpo=False)
    needs.packages({"attn_impl": ["sdpa"], "report_to": ["none"], "use_vllm": ["false"]},
                   is_grpo=False)  # fmt: skip
    monkeypatch.setattr(needs, "_is_missing", lambda name: True)
    with pytest.raises(MissingToolError, match=r"pip install 'ms-swift.* 'msgspec'"):
        needs.packages({}, is_grpo=True)


def test_deepspeed_is_asked_for_by_a_name_that_swift_knows_and_with_a_launcher(monkeypatch):
    monkeypatch.setattr(needs, "_is_missing", lambda name: name == "mpi4py")
    ask = lambda value, **env: list(needs.deepspeed({"deepspeed": [value]}, env))  # noqa: E731
    assert ask("zero2", NPROC_PER_NODE="1") == ask("my.json", NNODES="2") == []
    assert "zero3_offload, and no .json file; did you mean zero3" in ask("zero33", NNODES="1")[0]
    assert "mpi4py is missing: type --nproc 1" in ask("zero3")[0]


def test_preflight_as_a_command(folder, monkeypatch):
    monkeypatch.chdir(folder)
    write(folder, [row()])
    outcome = run_here(preflight.main, ["--dataset", "train.json"])
    assert (outcome.code, outcome.last_line) == (0, "1 rows, nothing wrong")
    write(folder, [row(image="b.jpg")])
    outcome = run_here(preflight.main, ["--dataset", "train.json", "--no-image-check"])
    assert outcome.code == 2 and "b.jpg is missing" in outcome.last_line
    outcome = run_here(preflight.main, ["--dataset", "nope.json"])
    assert outcome.code == 2 and "nope.json is missing: put it there" in outcome.last_line
