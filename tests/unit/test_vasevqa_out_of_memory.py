"""What counts as a lack of memory in swift, and what is said after it."""

import signal

import pytest

from vasevqa.model import memory, out_of_memory, plan

WORDS = ["--model", "/nowhere", "--torch_dtype", "bfloat16", "--max_length", "4096"]


@pytest.fixture(autouse=True)
def _sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_one_of_several_processes_explains_and_three_settings_are_named(tmp_path, capsys):
    words = ["sft", *WORDS, "--tuner_type", "full", "--output_dir", str(tmp_path)]
    environ = {"WORLD_SIZE": "4"}
    with out_of_memory._first(tmp_path) as is_first:  # another rank is at it
        assert is_first
        out_of_memory.explain(words, environ)
        assert capsys.readouterr().err == ""
    out_of_memory.explain(words, environ)
    text = capsys.readouterr().err
    assert "8,292,166,656 in torch.bfloat16" in text
    last = text.splitlines()[-1]
    assert text.startswith("out of memory; ")
    assert last.startswith("what helps most: --deepspeed zero3 (saves ")
    assert last.count(";") == 2 and "--tuner_type lora (saves " in last


def test_an_explanation_that_fails_is_a_line_and_no_second_error(tmp_path, capsys):
    out_of_memory.explain(["sft", *WORDS, "--output_dir", str(tmp_path / "nowhere")], {})
    assert capsys.readouterr().err.startswith("no memory plan: ")


@pytest.mark.slow
def test_zero3_divides_weights_gradients_and_moments_by_the_processes(tmp_path):
    flags = {"model": ["/nowhere"], "tuner_type": ["full"], "freeze_vit": ["false"]}
    rows = {}
    for name in ("", "zero2", "zero3"):
        own = {"deepspeed": [name]} if name else {}
        found = memory.plan(plan.Plan("sft", flags | own, world_size=4), 1003520)
        rows[name] = {what: size for what, size, _ in found.rows}
    count = 8_292_166_656  # of the model's card, all of them trained
    assert rows[""]["weights"] == rows["zero2"]["weights"] == pytest.approx(2 * count, abs=1000)
    assert rows["zero3"]["weights"] == rows[""]["weights"] // 4
    assert rows["zero3"]["optimizer"] == rows["zero2"]["optimizer"] == 2 * 2 * count // 4
    assert rows["zero2"]["gradients"] == rows[""]["gradients"] // 4
    assert rows["zero3"]["activations"] == rows[""]["activations"]
