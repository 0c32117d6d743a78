"""What is found before swift is imported: rows, pictures, weights, packages, room."""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib.util
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


def problems(folder, content, *, grpo=False, roots=(), **how):
    path = write(folder, content, **how)
    return preflight.check_data([path], list(roots) or [folder], is_grpo=grpo).problems


def test_the_documented_format_is_right_as_it_is(folder):
    assert problems(folder, [row(), row(answer="双耳瓶")]) == []


@contextlib.contextmanager
def http_server(folder):
    """The address of a server of the files in `folder`."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


FORMATS = {
    "messages": {"messages": [{"role": "user", "content": "<image>What?"},
                              {"role": "assistant", "content": "krater"}]},
    "parts": {"images": [], "messages": [
        {"role": "user", "content": [{"type": "image", "image": "a.jpg"},
                                     {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "krater"}]},
    "image_url": {"images": [], "messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.jpg"}},
                                     {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "krater"}]}]},
    "query and response": {"query": "<image>What?", "response": "krater"},
    "question and answer": {"question": "<image>What?", "answer": "krater"},
    "prompt and completion": {"prompt": "<image>What?", "completion": "krater"},
    "Alpaca": {"instruction": "<image>What?", "input": "", "output": "krater"},
    "history": {"query": "And now?", "response": "krater", "system": "You see vases.",
                "history": [["<image>What?", "an amphora"]]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_the_forms_that_swift_documents_are_read(form, folder):
    path = write(folder, [{"images": ["a.jpg"], **form}])
    found = training_files.open_file(path, [folder], is_grpo=False)
    assert not found.problems
    (read,) = found.rows
    assert read.images == ("a.jpg",) and read.answer == "krater"
    assert found.pictures == [folder / "a.jpg"]


def test_a_line_of_json_lines_ends_at_a_line_feed_alone(folder):
    text = "red\u2028figure\u0085krater"
    path = write(folder, json.dumps(row(answer=text), ensure_ascii=False) + "\n", "t.jsonl")
    (read,) = training_files.open_file(path, [folder], is_grpo=False).rows
    assert read.answer == text


def test_json_lines_a_mark_and_windows_line_ends_are_read(folder):
    lines = "\r\n".join(json.dumps(row(answer="红绘"), ensure_ascii=False) for _ in range(3))
    path = write(folder, lines + "\r\n", "train.jsonl", "utf-8-sig")
    found = training_files.open_file(path, [folder], is_grpo=False)
    assert [each.answer for each in found.rows] == ["红绘"] * 3 and not found.problems
    assert "byte-order mark" in (training_files.needs_copy(found, None) or "")


MISTAKES = {
    "no conversations": ({"images": ["a.jpg"]}, "has no conversations"),
    "empty conversations": ({"images": ["a.jpg"], "conversations": []}, "conversations is empty"),
    "a picture without a tag too many": (
        row(question="<image><image> What?"),
        "has 1 image(s) and 2 <image> tag(s)",
    ),
    "no answer": (row(answer=None), "has no answer"),
    "an empty answer": (row(answer="  "), "has no answer"),
    "an unknown speaker": (
        {"images": [], "conversations": [turn("robot", "x")]},
        "a turn from 'robot'; allowed: human, gpt, system",
    ),
    "a turn without text": (
        {"images": [], "conversations": [{"from": "human"}]},
        "without text",
    ),
    "no path": ({**row(), "images": [None]}, "images holds None"),
    "a missing picture": (row(image="b.jpg"), "b.jpg is missing"),
    "no object": ("a text", "is a str, expected"),
    "a missing picture among parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "b.jpg"}]},
                {"role": "assistant", "content": "x"},
            ]
        },
        "b.jpg is missing",
    ),
    "a part without its picture": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "has no image",
    ),
    "a missing film": ({**row(), "videos": ["v.mp4"]}, "v.mp4 is missing"),
    "a history of one": ({"query": "a", "response": "b", "history": ["c"]}, "list of pairs"),
}


@pytest.mark.parametrize(("bad", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_row_that_cannot_be_trained_on_is_named(bad, message, folder):
    found = problems(folder, [row(), bad])
    assert len(found) == 1 and message in found[0], found
    assert "row 2" in found[0] and "train.json" in found[0]


def test_without_any_tag_the_pictures_go_in_front_as_swift_puts_them(folder):
    assert problems(folder, [row(question="What is it?")]) == []


GRPO_MISTAKES = {
    "no picture": ({**row(question="What?"), "images": []}, "has no images"),
    "nothing to reward by": ({**row(answer=None), "caption": ""}, "has nothing to reward by"),
    "no question": ({**row(), "conversations": [turn("gpt", "krater")]}, "has no question"),
}


@pytest.mark.parametrize(("bad", "message"), GRPO_MISTAKES.values(), ids=GRPO_MISTAKES)
def test_grpo_asks_more_of_a_row(bad, message, folder):
    assert message in problems(folder, [bad], grpo=True)[0]


@pytest.mark.parametrize(
    "good", [row(), row(answer=None), {**row(answer=None), "caption": "", "solution": "krater"}]
)
def test_grpo_takes_a_solution_a_caption_or_an_answer(good, folder):
    assert problems(folder, [good], grpo=True) == []


def test_the_line_of_broken_json_is_named(folder):
    with pytest.raises(UserError, match=r"train.json, line 3: no JSON"):
        rows.read(write(folder, '[\n{"images": []},\n{"images" []}]'))
    with pytest.raises(UserError, match=r"a.jsonl, line 2: no JSON"):
        rows.read(write(folder, '{}\n{"a": \n', "a.jsonl"))
    with pytest.raises(UserError, match=r"one object a line needs the ending .jsonl"):
        rows.read(write(folder, "{}\n{}\n"))
    with pytest.raises(UserError, match="holds a dict, expected a list"):
        rows.read(write(folder, "{}"))
    with pytest.raises(UserError, match="holds no rows"):
        rows.read(write(folder, "[]"))
    with pytest.raises(UserError, match="no UTF-8"):
        rows.read(write(folder, [row(answer="é")], encoding="latin-1"))


def test_many_mistakes_are_counted_and_a_few_named(folder):
    found = problems(folder, [row(answer=None)] * 30)
    assert len(found) == 6 and found[-1].endswith("25 more rows have such mistakes")


def test_a_missing_file_is_no_hub_id(folder):
    found = preflight.check_data([folder / "nope.json"], [folder], is_grpo=False)
    assert "nope.json is missing: put it there" in found.problems[0]


def test_pictures_lie_below_the_first_root_that_holds_the_first_of_them(folder, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    shutil.copy(folder / "a.jpg", there / "a.jpg")
    path = write(folder, [row()])
    assert training_files.open_file(path, [here, there], is_grpo=False).root == there
    shutil.copy(folder / "a.jpg", here / "a.jpg")
    assert training_files.open_file(path, [here, there], is_grpo=False).root == here
    for directory in (here, there):
        (directory / "a.jpg").unlink()
    assert training_files.open_file(path, [here, there], is_grpo=False).root == folder


def test_files_with_pictures_in_different_places_are_copied_with_whole_paths(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / "a.jpg", other / "a.jpg")
    paths = [write(folder, [row()]), write(other, [row()])]
    files = [training_files.open_file(path, [], is_grpo=False) for path in paths]
    whole = plan.Plan("sft", {"dataset": [f"{paths[0]}#1", str(paths[1])], "output_dir": ["o"]})
    whole.flags["output_dir"] = [str(tmp_path / "out")]
    ready, root = training_files.given_to_swift(whole, files)
    assert root is None
    copies = [name.partition("#")[0] for name in ready.flags["dataset"]]
    assert ready.flags["dataset"][0].endswith("#1")
    images = [json.loads(Path(copy).read_text())["images"] for copy in copies]
    assert images == [[str(folder / "a.jpg")], [str(other / "a.jpg")]]


def test_grpo_rows_get_their_answer_as_solution(folder, tmp_path):
    file = training_files.open_file(
        write(folder, [row(), row(answer=None)]), [folder], is_grpo=True
    )
    copy = training_files.write_copy(file, tmp_path / "out")
    lines = [json.loads(line) for line in copy.read_text().splitlines()]
    assert [line["solution"] for line in lines] == ["amphora", "a vase"]


def test_a_broken_picture_is_found_by_the_sample(folder):
    (folder / "a.jpg").write_bytes((folder / "a.jpg").read_bytes()[:200])
    found = problems(folder, [row()])
    assert "row 1" in found[0] and "cannot be decoded" in found[0]


def test_a_picture_too_long_for_the_model_is_found(folder):
    Image.new("L", (2100, 10)).save(folder / "a.jpg")
    assert "is 2100 × 10: a side may be 200 times the other" in problems(folder, [row()])[0]


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


def test_a_row_longer_than_max_length_is_named_by_the_models_own_tokenizer(tmp_path, folder):
    model = model_at(tmp_path / "model")
    words = {"<unk>": 0} | {word: at for at, word in enumerate(("one", "two", "krater"), 1)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(model / "tokenizer.json"))
    path = write(folder, [row(), row(answer="one two " * 100)])
    flags = {"model": [str(model)], "max_length": ["100"]}
    found = preflight.check_data([path], [folder], is_grpo=False)
    preflight.check_lengths(plan.Plan("sft", flags | {"truncation_strategy": ["right"]}),
                            found.files, {})  # fmt: skip
    assert not found.problems
    preflight.check_lengths(plan.Plan("sft", flags), found.files, {})
    (line,) = found.problems
    assert "row 2: has 2" in line and "more than --max_length 100" in line


@pytest.mark.parametrize("size", [(112, 112), (331, 7), (3000, 2000), (14, 839), (20, 20)])
def test_a_pictures_tokens_are_those_of_qwens_own_resizing(size):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    wide, high = size
    most = 1003520
    expected = smart_resize(high, wide, 28, 4 * 28 * 28, most)
    assert lengths.picture_tokens(wide, high, most) == expected[0] * expected[1] // 28**2


def test_all_pictures_are_decoded_once_and_remembered(folder, monkeypatch):
    paths = [folder / f"{number}.png" for number in range(80)]
    for path in paths:
        Image.new("L", (4, 4)).save(path)
    paths[77].write_bytes(b"<html>")
    reported: list[tuple[int, int]] = []
    report = lambda *counts: reported.append(counts)  # noqa: E731
    seen = pictures.check_all(paths, folder / "memory.json", report)
    assert list(pictures.unusable(seen)) == [paths[77]] and reported[-1] == (80, 80)
    assert seen[paths[0]] == (None, [4, 4])
    monkeypatch.setattr(pictures, "check", lambda block: pytest.fail("decoded again"))
    assert pictures.check_all(paths, folder / "memory.json", report) == seen


def test_a_replaced_picture_is_decoded_again(folder):
    path, memory = folder / "a.jpg", folder / "memory.json"
    assert not pictures.unusable(pictures.check_all([path], memory, lambda *_: None))
    path.write_bytes(b"no picture")
    assert list(pictures.unusable(pictures.check_all([path], memory, lambda *_: None))) == [path]


def safetensors(path, shape=(2,), cut=0):
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8 - cut))


def model_at(path, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", **config}))
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


def test_a_missing_model_comes_with_the_way_to_get_it(tmp_path):
    missing = tmp_path / "Qwen2.5-VL-3B-Instruct"
    assert "modelscope download --model Qwen/Qwen2.5-VL-3B-Instruct" in why(missing)[0]
    assert "run ./merge.sh after ./sft.sh" in why(tmp_path / "checkpoint-merged", grpo=True)[0]


def test_an_adapter_is_no_model(tmp_path):
    model = model_at(tmp_path / "m")
    (model / "adapter_config.json").write_text("{}")
    assert "is an adapter, not a model: ./merge.sh" in why(model)[0]


def test_a_reward_that_no_plugin_defines_is_refused(tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text("def my_reward(responses, references):\n    return []\n")
    flags = {"external_plugins": [str(plugin)], "reward_funcs": ["my_reward", "format"]}
    assert list(needs.plugins(flags)) == []
    flags["reward_funcs"] = ["vase_acc"]
    assert "--reward_funcs vase_acc is defined nowhere" in next(iter(needs.plugins(flags)))
    plugin.write_text("def my_reward(responses, references)\n")
    assert "plugin.py, line 1: no Python" in next(iter(needs.plugins(flags)))
    plugin.unlink()
    assert "plugin.py is missing" in next(iter(needs.plugins(flags)))


@pytest.mark.parametrize(
    ("flags", "world", "fits"),
    [
        ({"num_generations": ["4"], "gradient_accumulation_steps": ["4"]}, 1, True),
        ({"num_generations": ["4"], "gradient_accumulation_steps": ["1"]}, 1, False),
        ({"num_generations": ["4"], "gradient_accumulation_steps": ["1"]}, 4, True),
        ({"num_generations": ["8"], "generation_batch_size": ["16"]}, 1, True),
        ({"num_generations": ["1"], "gradient_accumulation_steps": ["4"]}, 1, False),
    ],
)
def test_grpo_batches_hold_whole_groups(flags, world, fits):
    assert (list(needs.divisible(flags, world)) == []) is fits


def test_the_file_that_ends_swifts_runs_is_refused(tmp_path):
    assert list(needs.stop_file(tmp_path / "stop")) == []
    (tmp_path / "stop").touch()
    assert "remove it" in next(iter(needs.stop_file(tmp_path / "stop")))


def test_room_for_checkpoints_is_asked_for(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert list(needs.disk(tmp_path / "a" / "b", free // 4, 2)) == []
    assert "--save_total_limit" in next(iter(needs.disk(tmp_path, free // 2, 2)))


def test_missing_packages_are_named_with_their_pip_line(monkeypatch):
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingToolError, match=r"pip install 'ms-swift.* 'msgspec'"):
        needs.packages({}, is_grpo=True)
    with pytest.raises(MissingToolError) as caught:
        needs.packages({}, is_grpo=False)
    assert "msgspec" not in str(caught.value)


def test_preflight_as_a_command(folder, monkeypatch):
    monkeypatch.chdir(folder)
    write(folder, [row()])
    outcome = run_here(preflight.main, ["--dataset", "train.json"])
    assert (outcome.code, outcome.last_line) == (0, "1 rows, nothing wrong")
    write(folder, [row(image="b.jpg")])
    outcome = run_here(preflight.main, ["--dataset", "train.json", "--no-image-check"])
    assert outcome.code == 2 and "b.jpg is missing" in outcome.last_line


FLAGS = {
    "attn_impl flash_attn": ("flash_attn", "flash-attn --no-build-isolation, or type --attn_impl"),
    "quant_method bnb": ("bitsandbytes", "pip install bitsandbytes, or leave --quant_method out"),
    "optim paged_adamw_8bit": ("bitsandbytes", "or type --optim adamw_torch"),
    "use_liger_kernel true": ("liger_kernel", "pip install liger-kernel"),
    "report_to tensorboard wandb": ("wandb", "--report_to wandb needs a package that is missing"),
    "report_to swanlab": ("swanlab", "or type --report_to tensorboard"),
    "use_vllm": ("vllm", "--use_vllm true needs a package that is missing: pip install vllm"),
    "deepspeed zero2": ("deepspeed", "pip install deepspeed, or leave --deepspeed out"),
}


@pytest.mark.parametrize(("words", "expected"), FLAGS.items(), ids=FLAGS)
def test_a_flag_whose_package_is_missing_says_which_and_what_to_type_instead(
    words, expected, monkeypatch
):
    module, said = expected
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else find_spec("json")
    )
    name, *values = words.split()
    with pytest.raises(MissingToolError, match=re.escape(said)):
        needs.packages({name: values}, is_grpo=False)
    needs.packages({"attn_impl": ["sdpa"], "report_to": ["none"], "use_vllm": ["false"]},
                   is_grpo=False)  # fmt: skip


def test_deepspeed_is_asked_for_by_a_name_that_swift_knows_and_with_a_launcher(monkeypatch):
    monkeypatch.setattr(needs, "_is_missing", lambda name: name == "mpi4py")
    ask = lambda value, **env: list(needs.deepspeed({"deepspeed": [value]}, env))  # noqa: E731
    assert ask("zero2", NPROC_PER_NODE="1") == ask("my.json", NNODES="2") == []
    assert "zero3_offload, and no .json file; did you mean zero3" in ask("zero33", NNODES="1")[0]
    assert "mpi4py is missing: type --nproc 1" in ask("zero3")[0]
