"""Which checkpoint a run goes on from, and which adapter is merged into what."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from shared.errors import UserError
from shared.files import read_json, read_json_lines, write_json
from vasevqa.model import merge as merge_script
from vasevqa.model import merging, plan, receipt, runs, training_files

LAYER = "model.layers.0.self_attn.q_proj.weight"


def checkpoint(path, step, *, adapter=True, when=0, tensors=None, base="/base"):
    path.mkdir(parents=True)
    name = "adapter_model" if adapter else "model"
    save_file(tensors or {"w": torch.full((2,), float(step))}, path / f"{name}.safetensors")
    config = {"r": 2, "lora_alpha": 4} if adapter else {"model_type": "qwen2_5_vl"}
    write_json(path / ("adapter_config.json" if adapter else "config.json"), config)
    write_json(path / "args.json", {"model": str(base)})
    write_json(path / "trainer_state.json", {"global_step": step})
    os.utime(path / "trainer_state.json", (when, when))
    return path


def status(directory, state, identity=None):
    write_json(directory / "status.json", {"state": state, "pid": 0})
    write_json(directory / "config.json", {"identity": identity or {}})


def begun(run_dir, identity=None, resume="auto"):
    found = runs.continuation(run_dir, identity or {}, resume)
    return found.path.name if found else None


@pytest.mark.parametrize("state", ["stopped", "failed", "running"])
def test_an_interrupted_run_is_continued_from_its_newest_checkpoint(state, tmp_path):
    for step in (2, 10, 4):
        checkpoint(tmp_path / f"checkpoint-{step}", step, when=step)
    status(tmp_path, state)
    assert begun(tmp_path) == "checkpoint-10"


@pytest.mark.parametrize(("state", "resume"), [("done", "auto"), ("stopped", "never")])
def test_a_finished_run_moves_aside(state, resume, tmp_path):
    run_dir = tmp_path / "7B"
    checkpoint(run_dir / "checkpoint-2", 2)
    status(run_dir, state)
    assert begun(run_dir, resume=resume) is None
    assert (tmp_path / "7B.1" / "checkpoint-2").is_dir() and not list(run_dir.iterdir())


def test_other_settings_move_the_run_aside_and_are_named(tmp_path, caplog):
    caplog.set_level("INFO")
    run_dir = tmp_path / "7B"
    checkpoint(run_dir / "checkpoint-2", 2)
    status(run_dir, "stopped", {"learning_rate": ["1e-4"]})
    assert begun(run_dir, {"learning_rate": ["1e-3"]}) is None
    assert "settings differ: learning_rate" in caplog.text
    assert (tmp_path / "7B.1").is_dir()


def test_a_checkpoint_that_was_half_written_is_passed_over(tmp_path, caplog):
    checkpoint(tmp_path / "checkpoint-2", 2, when=2)
    torn = checkpoint(tmp_path / "checkpoint-4", 4, when=4)
    content = (torn / "adapter_model.safetensors").read_bytes()
    (torn / "adapter_model.safetensors").write_bytes(content[:-3])
    checkpoint(tmp_path / "checkpoint-6", 5, when=6)  # another step than its name says
    (checkpoint(tmp_path / "checkpoint-8", 8, when=8) / "trainer_state.json").unlink()
    status(tmp_path, "failed")
    assert begun(tmp_path) == "checkpoint-2"
    assert "checkpoint-4 is not whole" in caplog.text


def test_a_named_checkpoint_has_to_be_whole(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        runs.named(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-8").mkdir()
    with pytest.raises(UserError, match="is no whole checkpoint"):
        runs.named(tmp_path / "checkpoint-8")
    own = checkpoint(tmp_path / "swift" / "checkpoint-2", 2)
    with pytest.raises(UserError, match="a run that this toolkit did not start"):
        begun(own.parent)


def test_resume_from_checkpoint_keeps_the_run_it_belongs_to(tmp_path):
    for step in (2, 4):
        checkpoint(tmp_path / "7B" / f"checkpoint-{step}", step, when=step)
    status(tmp_path / "7B", "done")
    named = tmp_path / "7B" / "checkpoint-2"
    for output_dir in ("7B", "new"):
        flags = {"output_dir": [str(tmp_path / output_dir)]}
        flags["resume_from_checkpoint"] = [str(named)]
        begun_plan = runs.begin(plan.Plan("sft", flags))
        assert begun_plan.flags["resume_from_checkpoint"] == [str(named)] and named.is_dir()


# --- merging --------------------------------------------------------------------------------------


def model(path, tensors=None):
    path.mkdir(parents=True)
    save_file(tensors or {LAYER: torch.eye(3)}, path / "model.safetensors")
    write_json(path / "config.json", {"model_type": "qwen2_5_vl"})
    return path


def lora(seed=0):
    torch.manual_seed(seed)
    prefix = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    return {
        f"{prefix}.lora_A.weight": torch.randn(2, 3),
        f"{prefix}.lora_B.weight": torch.randn(3, 2),
    }


def test_the_newest_adapter_is_chosen_whichever_run_it_is_of(tmp_path):
    with pytest.raises(UserError, match=r"run ./sft.sh first, or type --adapters"):
        merging.choose(None, tmp_path)
    checkpoint(tmp_path / "7B" / "checkpoint-600", 600, when=10)
    checkpoint(tmp_path / "GRPO" / "v0-x" / "checkpoint-30", 30, when=20)
    assert merging.choose(None, tmp_path).path.name == "checkpoint-30"
    assert merging.choose(str(tmp_path / "7B"), tmp_path).path.name == "checkpoint-600"


def test_a_base_that_was_replaced_is_found_under_its_new_name(tmp_path):
    base = model(tmp_path / "checkpoint-merged")
    run = tmp_path / "GRPO"
    chosen = checkpoint(run / "checkpoint-4", 4, base=base, tensors=lora())
    write_json(run / "config.json", {"base_files": runs.files_of(base)})
    base.rename(tmp_path / "checkpoint-merged.1")
    model(base, {LAYER: torch.zeros(3, 3)})
    found = merging.plan(runs.Checkpoint(chosen, 4), base)
    assert found.base == str(tmp_path / "checkpoint-merged.1")
    (tmp_path / "checkpoint-merged.1" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has changed since the adapter was trained"):
        merging.plan(runs.Checkpoint(chosen, 4), base)


def merged_with(base, adapter, scale):
    tensors = dict(adapter)
    down, up = (next(v for k, v in tensors.items() if f"lora_{c}" in k) for c in "AB")
    return {LAYER: base + scale * up @ down}


def test_merged_weights_are_compared_with_base_and_adapter(tmp_path):
    base = model(tmp_path / "base")
    chosen = checkpoint(tmp_path / "checkpoint-2", 2, base=base, tensors=lora())
    planned = merging.plan(runs.Checkpoint(chosen, 2), tmp_path / "target")
    right = model(tmp_path / "right", merged_with(torch.eye(3), lora(), scale=2.0))  # 4 / r 2
    merging.verify(planned, right)
    wrong = model(tmp_path / "wrong", merged_with(torch.eye(3), lora(), scale=1.0))
    with pytest.raises(UserError, match=r"q_proj.weight is .*% away from base \+ adapter"):
        merging.verify(planned, wrong)
    short = model(tmp_path / "short", {"other": torch.ones(1)})
    with pytest.raises(UserError, match=r"lacks model\.layers\.0"):
        merging.verify(planned, short)


def run_merge(root, *typed):
    target = ["--merge_lora", "true", "--output_dir", str(root / "checkpoint-merged")]
    return merge_script.main([*target, "---", *typed])


def test_after_a_full_training_there_is_nothing_to_merge(tmp_path, caplog):
    caplog.set_level("INFO")
    whole = checkpoint(tmp_path / "GRPO" / "checkpoint-4", 4, adapter=False, when=9)
    (whole / "optimizer.pt").write_bytes(b"x")
    model(tmp_path / "checkpoint-merged")
    model(tmp_path / "checkpoint-merged.1")
    assert run_merge(tmp_path) == 0
    assert "nothing to merge" in caplog.text
    target = tmp_path / "checkpoint-merged"
    assert (target / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (target / "optimizer.pt").exists() and whole.is_dir()
    assert (tmp_path / "checkpoint-merged.2" / "model.safetensors").is_file()
    assert run_merge(tmp_path) == 0  # once more: nothing is done
    assert not (tmp_path / "checkpoint-merged.3").exists()


def test_the_same_adapter_is_merged_once(tmp_path, caplog):
    caplog.set_level("INFO")
    base = model(tmp_path / "base")
    chosen = checkpoint(tmp_path / "7B" / "checkpoint-2", 2, base=base, tensors=lora())
    target = model(tmp_path / "checkpoint-merged")
    note = merging.Merge(chosen, str(base), target).note
    write_json(target / merging.NOTE, note)
    assert run_merge(tmp_path) == 0 and "done before" in caplog.text
    save_file(lora(seed=1), chosen / "adapter_model.safetensors")  # trained on
    assert not merging.plan(runs.Checkpoint(chosen, 2), target).is_done


def test_a_dry_run_merges_nothing(tmp_path, capsys):
    base = model(tmp_path / "base")
    checkpoint(tmp_path / "7B" / "checkpoint-2", 2, base=base, tensors=lora())
    assert run_merge(tmp_path, "--dry-run") == 0
    line = capsys.readouterr().out
    assert line.startswith("swift export") and f"--model {base}" in line and "exist_ok" not in line
    assert not (tmp_path / "checkpoint-merged").exists()


# --- what became of each row ----------------------------------------------------------------------


@pytest.mark.parametrize(("is_done", "is_whole"), [(True, True), (True, False), (False, True)])
def test_a_row_that_swift_lost_on_its_way_is_named_where_it_was_to_see_all(
    is_done, is_whole, tmp_path, caplog
):
    """Rows 1 to 5: trained on twice, trained on, for validation, left out, lost."""
    caplog.set_level("INFO")
    data = tmp_path / "train.json"
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "krater"}]
    data.write_text(json.dumps([{"conversations": turns}] * 3 + [{}, {"conversations": turns}]))
    file = training_files.open_file(data, [tmp_path], is_grpo=False)
    file.leave_out()
    places = [f"{at} {data}" for at in range(4)]
    batches = [{"places": places[:2]}, {"places": places[:1]}]
    (tmp_path / receipt.SEEN).write_text("".join(f"{json.dumps(batch)}\n" for batch in batches))
    held = json.dumps({"receipt_place": places[2]})
    (tmp_path / "val_dataset.jsonl").write_text(f"{held}\n")
    status(tmp_path, "done")
    receipt.close(tmp_path, {str(data): file}, is_done=is_done, is_whole=is_whole)
    counts = {"rows": 5, "rows left out": 1, "rows for validation": 1, "rows trained on": 2}
    assert read_json(tmp_path / "status.json")["data"] == counts
    rows = list(read_json_lines(tmp_path / receipt.NAME))
    assert [(row["row"], row["seen"]) for row in rows] == [(1, 2), (2, 1), (3, 0), (5, 0)]
    assert (f"swift did not train on {data}, row 5" in caplog.text) is (is_done and is_whole)
    assert ("rows trained on: 2" in caplog.text) is is_done  # else the reason is the last line
