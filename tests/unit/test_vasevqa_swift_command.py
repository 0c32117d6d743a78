"""Starting swift: in this process, or as torchrun's processes."""

from __future__ import annotations

import os
import sys

import pytest

from shared.errors import MissingToolError
from vasevqa.model import memory, plan, swift_command


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


SEVEN = {"model": ["/nowhere"], "torch_dtype": ["bfloat16"], "output_dir": ["/o"]}


@pytest.mark.slow
def test_the_memory_plan_of_7b_stands_beside_the_documents_figure():
    sft = plan.Plan("sft", {**SEVEN, "lora_rank": ["8"], "max_length": ["4096"]})
    text = memory.text(sft, 1003520)
    # 8,292,166,656 parameters: the figure of the model's card (8.29 B) in bfloat16
    assert "8,292,166,656" in text and "16.58 GB" in text
    assert "at least 24 GB" in text
    total = float(text.split("in all")[1].split("GB")[0])
    assert 17 < total < 24


@pytest.mark.slow
def test_lora_of_rank_8_counts_what_peft_counts(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    run = plan.Plan("sft", SEVEN | {"model": [str(tmp_path)]})
    rows = {what: size for what, size, _ in memory.plan(run, 1003520).rows}
    targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(Qwen2_5_VLConfig(**memory.SEVEN_BILLION))
        tuned = get_peft_model(model, LoraConfig(r=8, target_modules=targets))
    assert rows["LoRA"] == 4 * sum(p.numel() for p in tuned.parameters() if p.requires_grad)
