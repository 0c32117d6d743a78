"""Starting swift, as torchrun's processes too; the memory that it will take."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch

from shared.errors import MissingToolError
from vasevqa.model import memory, out_of_memory, plan, swift_command


class Replaced(Exception):  # noqa: N818
    pass


def test_several_processes_are_torchruns_with_the_users_meeting_point(monkeypatch):
    became: list[str] = []

    def replace(_program, words):
        became.extend(words)
        raise Replaced

    monkeypatch.setattr(os, "execv", replace)
    variables = {"NPROC_PER_NODE": "4", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0"}
    for name, value in {**variables, "MASTER_PORT": "29501"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(Replaced):
        swift_command.main(["sft", "--model", "m"])
    assert became[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert became[-3:] == ["sft", "--model", "m"]
    flags = dict(zip(became[3:-4:2], became[4:-4:2], strict=True))
    assert flags == {
        **{"--signals-to-handle": "SIGTERM,SIGINT,SIGQUIT", "--nproc_per_node": "4"},
        **{"--nnodes": "2", "--node_rank": "1", "--master_addr": "host0"},
        "--master_port": "29501",
    }


def test_an_unknown_command_names_the_package(monkeypatch):
    monkeypatch.setattr(swift_command.os, "register_at_fork", lambda **_: None)
    with pytest.raises(MissingToolError, match="no command nothing: pip install"):
        swift_command.main(["nothing"])


@pytest.fixture
def _sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.usefixtures("_sigterm")
def test_one_of_several_processes_explains_a_lack_of_memory_in_a_plan_or_a_line(tmp_path, capsys):
    words = ["sft", "--model", "/nowhere", "--tuner_type", "full", "--output_dir", str(tmp_path)]
    environ = {"WORLD_SIZE": "4"}
    with out_of_memory._first(tmp_path) as is_first:  # another rank is at it
        assert is_first
        out_of_memory.explain(words, environ)
        assert capsys.readouterr().err == ""
    out_of_memory.explain(words, environ)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("what helps most: --deepspeed zero3 (saves ") and last.count(";") == 2
    out_of_memory.explain(["sft", "--output_dir", str(tmp_path / "nowhere")], environ)
    assert capsys.readouterr().err.splitlines()[-1].startswith("no memory plan: ")


def rows_of(**changes):
    """Bytes of each row of the plan of four processes; the model is that of 7B."""
    flags = {"model": ["/nowhere"]} | {name: [value] for name, value in changes.items()}
    found = memory.plan(plan.Plan("sft", flags, world_size=4), 1003520)
    return {what: size for what, size, _ in found.rows}


@pytest.mark.slow
def test_lora_of_rank_8_counts_what_peft_counts():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(Qwen2_5_VLConfig(**memory.SEVEN_BILLION))
        tuned = get_peft_model(model, LoraConfig(r=8, target_modules=targets))
    assert rows_of()["LoRA"] == 4 * sum(p.numel() for p in tuned.parameters() if p.requires_grad)


@pytest.mark.slow
def test_zero3_divides_weights_gradients_and_moments_by_the_processes():
    full = {"tuner_type": "full", "freeze_vit": "false"}
    one = rows_of(**full)
    two, three = (rows_of(**full, deepspeed=stage) for stage in ("zero2", "zero3"))
    count = 8_292_166_656  # of the model's card, all of them trained
    assert one["weights"] == two["weights"] == pytest.approx(2 * count, abs=1000)
    assert three["weights"] == one["weights"] // 4
    assert three["optimizer"] == two["optimizer"] == 2 * 2 * count // 4
    assert two["gradients"] == one["gradients"] // 4
    assert three["activations"] == one["activations"]
