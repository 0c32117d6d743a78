"""From the flags of sft.sh and of the user to swift's command."""

from __future__ import annotations

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
    assert swift_flags.read(["--lr=1", "--lr", "2"]) == {"lr": ["2"]}  # of two the last


def test_flags_of_older_releases_are_translated_and_named():
    flags, notes = swift_flags.translate({"train_type": ["full"], "custom_register_path": ["p.py"]})
    assert flags == {"tuner_type": ["full"], "external_plugins": ["p.py"]}
    assert notes[0] == "--train_type of older ms-swift is --tuner_type now"
    with pytest.raises(UserError, match="same setting, given twice"):
        swift_flags.translate({"tuner_type": ["lora"], "train_type": ["full"]})


def test_a_hub_id_stays_one_unless_a_directory_of_that_name_is_there(tmp_path):
    words = ["--model", "Qwen/Q", "--dataset", "data/a.json", "b.jsonl#50"]
    found = make(*words, here=tmp_path).flags
    assert found["model"] == ["Qwen/Q"]
    assert found["dataset"] == [f"{tmp_path}/data/a.json", f"{tmp_path}/b.jsonl#50"]
    (tmp_path / "Qwen" / "Q").mkdir(parents=True)
    assert make(*words, here=tmp_path).flags["model"] == [f"{tmp_path}/Qwen/Q"]


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
    assert flags["strict"] == ["true"]  # a row that cannot be read ends the run
    names = ("check_model", "strict", "add_version")
    typed = [word for name in names for word in (f"--{name}", "maybe")]
    flags = machine(make(*typed), 1).flags
    assert [flags[name] for name in names] == [["maybe"]] * 3


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(UserError, match="NPROC_PER_NODE=4, but 2 GPU"):
        machine(make(), 2, NPROC_PER_NODE="4")
    assert machine(make(), 4, NPROC_PER_NODE="4", NNODES="2").world_size == 8


@pytest.mark.parametrize(
    ("script", "batch", "accumulated", "more", "rows", "steps"),
    [
        # 100 rows in batches of 4 are 25, of which 3 are accumulated: 9 steps, twice
        ("sft", 4, 3, "--num_train_epochs 2", 100, 18),
        ("sft", 4, 3, "--max_steps 7", 100, 7),
        # 8 rows × 4 answers = 32 answers, 4 a step
        ("grpo", 1, 4, "--num_generations 4 --num_train_epochs 1", 8, 8),
    ],
)
def test_steps_are_reckoned_as_swift_counts_them(script, batch, accumulated, more, rows, steps):
    words = [f"--per_device_train_batch_size={batch}", "--gradient_accumulation_steps"]
    made = make(*words, str(accumulated), *more.split(), script=script)
    assert plan.num_steps(made, rows) == steps


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
