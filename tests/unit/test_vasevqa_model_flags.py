"""From the flags of sft.sh and of the user to swift's command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.errors import UserError
from vasevqa.model import paths, plan, swift_flags

DOCUMENTED = ["--model", "./models/Q", "--train_type", "lora", "--output_dir", "output/7B"]


def make(*typed, script="sft", documented=DOCUMENTED, here="/here"):
    return plan.make(script, list(documented), list(typed), Path(here), Path("/house/model"))


def test_flags_are_read_in_every_spelling():
    words = ["--a", "1", "--b-c=2", "--d", "x", "y", "--e", "--f", "-1"]
    assert swift_flags.read(words) == {
        "a": ["1"], "b_c": ["2"], "d": ["x", "y"], "e": [], "f": ["-1"],
    }  # fmt: skip


def test_the_last_of_a_flag_typed_twice_counts():
    assert swift_flags.read(["--lr=1", "--lr", "2"]) == {"lr": ["2"]}


def test_flags_of_older_releases_are_translated_and_named():
    flags, notes = swift_flags.translate({"train_type": ["full"], "custom_register_path": ["p.py"]})
    assert flags == {"tuner_type": ["full"], "external_plugins": ["p.py"]}
    assert notes[0] == "--train_type of older ms-swift is --tuner_type now"


def test_a_setting_under_both_its_names_is_refused():
    with pytest.raises(UserError, match="same setting, given twice"):
        swift_flags.translate({"tuner_type": ["lora"], "train_type": ["full"]})


@pytest.mark.parametrize("typed", [["--tuner_type", "full"], ["--train-type=full"]])
def test_typed_flags_win_under_either_name(typed):
    assert make(*typed).flags["tuner_type"] == ["full"]


def test_documented_paths_begin_in_model_and_typed_ones_where_they_are_typed():
    found = make("--dataset", "data/a.json", "b.jsonl#50", "--output_dir", "../out").flags
    assert found["model"] == ["/house/model/models/Q"]
    assert found["dataset"] == ["/here/data/a.json", "/here/b.jsonl#50"]
    assert found["output_dir"] == ["/here/../out"]


def test_a_hub_id_stays_one_unless_a_directory_of_that_name_is_there(tmp_path):
    assert make("--model", "Qwen/Qwen2.5-VL-3B", here=tmp_path).flags["model"] == [
        "Qwen/Qwen2.5-VL-3B"
    ]
    (tmp_path / "Qwen" / "Qwen2.5-VL-3B").mkdir(parents=True)
    found = make("--model", "Qwen/Qwen2.5-VL-3B", here=tmp_path).flags["model"]
    assert found == [str(tmp_path / "Qwen" / "Qwen2.5-VL-3B")]


def test_a_system_prompt_is_a_path_only_when_it_ends_so():
    base = Path("/b")
    assert paths.absolute({"system": ["./p.txt"]}, base) == {"system": ["/b/p.txt"]}
    assert paths.absolute({"system": ["Be brief."]}, base) == {"system": ["Be brief."]}


def test_every_documented_flag_is_one_of_the_installed_swift():
    for script in ("sft.sh", "grpo.sh", "merge.sh", "hf2megatron.sh"):
        text = (Path(plan.__file__).parent / script).read_text()
        body = text[text.index("arguments=(") : text.index("\n)\n")]
        names = [line.split()[0][2:] for line in body.splitlines() if line.startswith("  --")]
        flags, _ = swift_flags.translate({name: [] for name in names})
        assert len(flags) >= 2
        swift_flags.refuse_unknown(flags)


def machine(plan_, gpus, **environ):
    return plan.for_this_machine(plan_, gpus, environ)


def test_without_a_gpu_swift_is_told_so():
    assert machine(make(), 0).flags["use_cpu"] == ["true"]
    assert "use_cpu" not in machine(make(), 1).flags


def test_the_hub_is_not_asked_and_sigterm_saves():
    flags = machine(make("--callbacks", "early_stop"), 1).flags
    assert flags["check_model"] == ["false"]
    assert flags["callbacks"] == ["early_stop", "graceful_exit"]


def test_the_user_may_ask_the_hub():
    assert machine(make("--check_model", "true"), 1).flags["check_model"] == ["true"]


def test_a_row_that_cannot_be_read_ends_the_run_and_is_not_replaced():
    assert machine(make(), 1).flags["strict"] == ["true"]
    assert machine(make("--strict", "false"), 1).flags["strict"] == ["false"]
    assert make("--no-image-check").identity == make().identity


def test_qwen_directories_are_told_by_their_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    flags = machine(make("--model", str(tmp_path)), 1).flags
    assert flags["model_type"] == flags["template"] == ["qwen2_5_vl"]
    assert "template" not in machine(make(), 1).flags


def test_grpo_gets_the_adapter_of_plain_reward_functions():
    found = machine(make("--external_plugins", "p.py", script="grpo"), 1)
    assert found.command[0] == "rlhf"
    names = [Path(name).name for name in found.flags["external_plugins"]]
    assert names == ["p.py", "receipt.py", "adapt.py"]


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(UserError, match="NPROC_PER_NODE=4, but 2 GPU"):
        machine(make(), 2, NPROC_PER_NODE="4")
    assert machine(make(), 4, NPROC_PER_NODE="4", NNODES="2").world_size == 8


@pytest.mark.parametrize(
    ("typed", "script", "rows", "steps"),
    [
        # 100 rows in batches of 4 are 25, of which 3 are accumulated: 9 steps, twice
        (
            "--per_device_train_batch_size 4 --gradient_accumulation_steps 3 --num_train_epochs 2",
            "sft", 100, 18,
        ),
        ("--max_steps 7", "sft", 100, 7),
        # 8 rows × 4 answers = 32 answers, 4 a step
        (
            "--num_generations 4 --gradient_accumulation_steps 4 --num_train_epochs 1",
            "grpo", 8, 8,
        ),
    ],
)  # fmt: skip
def test_steps_are_reckoned_as_swift_counts_them(typed, script, rows, steps):
    assert plan.num_steps(make(*typed.split(), script=script), rows) == steps


def test_what_changes_no_number_does_not_make_another_run():
    one, other = make("--logging_steps", "1"), make("--logging_steps", "9")
    assert one.identity == other.identity
    assert make("--learning_rate", "1").identity != make("--learning_rate", "2").identity


@pytest.mark.slow
def test_the_names_read_from_the_sources_hold_every_flag_of_swift():
    from dataclasses import fields

    from swift.arguments import ExportArguments, RLHFArguments, SftArguments

    for kind in (SftArguments, RLHFArguments, ExportArguments):
        missing = {item.name for item in fields(kind) if item.init} - swift_flags.declared()
        assert not missing, kind
