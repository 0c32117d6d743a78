import json
from pathlib import Path

import pytest

from shared.files import read_json_lines
from shared.program import JsonLinesProgress

# as ms-swift 4.6 writes them
TRAIN = {
    **{"loss": 0.5, "grad_norm": 1.25, "learning_rate": 1e-4, "token_acc": 0.75, "epoch": 1.5},
    **{"global_step/max_steps": "3/6", "elapsed_time": "2s", "remaining_time": "6s"},
    **{"memory(GiB)": 2.0, "train_speed(s/it)": 2.0},
}
EVAL = {"eval_loss": 0.25, "epoch": 1.5, "global_step/max_steps": "3/6", "train_speed(s/it)": 2.0}
END = {"train_runtime": 9.0, "train_loss": 0.4, "global_step/max_steps": "6/6"}
LAST = {
    **{"last_model_checkpoint": "/o/v0/checkpoint-6", "global_step": 6},
    **{"best_model_checkpoint": "/o/v0/checkpoint-3", "best_metric": 0.25},
}


def write(path: Path, *lines: object, end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write("\n".join(json.dumps(line) for line in lines) + end)


def rows(run_dir: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k != "time"}
        for row in read_json_lines(run_dir / "metrics.jsonl")
    ]


def test_a_line_becomes_status_and_metrics(tmp_path):
    progress = JsonLinesProgress(tmp_path)
    assert progress() == {}
    write(tmp_path / "v0-2026" / "logging.jsonl", TRAIN)
    values = {
        **{"loss": 0.5, "grad_norm": 1.25, "lr": 1e-4, "token_acc": 0.75},
        **{"memory_bytes": 2 * 2**30, "seconds_per_step": 2.0, "steps_per_s": 0.5},
    }
    assert progress() == {"step": 3, "total_steps": 6, "epoch": 1, "eta_s": 6.0, "last": values}
    assert rows(tmp_path) == [{"step": 3, "epoch": 1, "split": "train", **values}]
    assert progress() == {}


def test_the_epoch_is_the_one_at_work_from_0(tmp_path):
    progress = JsonLinesProgress(tmp_path)
    for behind, epoch in [(0.0, 0), (1.0, 0), (1.25, 1)]:
        write(tmp_path / "logging.jsonl", TRAIN | {"epoch": behind})
        assert progress()["epoch"] == epoch


def test_validation_is_a_split_of_its_own_and_the_last_values_add_up(tmp_path):
    progress = JsonLinesProgress(tmp_path)
    write(tmp_path / "logging.jsonl", TRAIN, EVAL, END)
    last = progress()["last"]
    assert (last["loss"], last["eval_loss"], last["train_loss"]) == (0.5, 0.25, 0.4)
    found = rows(tmp_path)
    assert [(row["split"], row["step"], row.get("loss")) for row in found] == [
        ("train", 3, 0.5),
        ("val", 3, 0.25),
        ("end", 6, None),
    ]


def test_the_last_line_names_the_checkpoints(tmp_path):
    progress = JsonLinesProgress(tmp_path)
    write(tmp_path / "logging.jsonl", LAST)
    assert progress() == {"outputs": ["/o/v0/checkpoint-3", "/o/v0/checkpoint-6"]}
    assert rows(tmp_path) == []


def test_half_a_line_waits_for_its_end_and_no_line_is_read_twice(tmp_path):
    progress, path = JsonLinesProgress(tmp_path), tmp_path / "logging.jsonl"
    text = json.dumps(TRAIN) + "\n"
    path.write_text(text + text[:20])
    assert progress()["step"] == 3
    assert progress() == {}
    with path.open("a") as stream:
        stream.write(text[20:])
    assert progress()["step"] == 3
    assert len(rows(tmp_path)) == 2


@pytest.mark.parametrize("line", ["rubbish", "[1]", '{"global_step/max_steps": "x/6"}'])
def test_lines_of_another_kind_are_passed_over(tmp_path, line):
    progress = JsonLinesProgress(tmp_path)
    (tmp_path / "logging.jsonl").write_bytes(line.encode() + b"\xff\n")
    assert progress() == {}
    write(tmp_path / "logging.jsonl", TRAIN)
    assert progress()["step"] == 3


def test_ten_steps_without_a_spread_of_rewards_are_said_once(tmp_path, caplog):
    def step(number: int, spread: float) -> dict:
        return TRAIN | {"global_step/max_steps": f"{number}/40", "reward_std": spread}

    progress = JsonLinesProgress(tmp_path)
    write(tmp_path / "logging.jsonl", *(step(n, 0.0) for n in range(1, 10)), step(10, 0.1))
    progress()
    assert not caplog.records
    write(tmp_path / "logging.jsonl", *(step(n, 0.0) for n in range(11, 31)))
    assert progress()["last"]["reward_std"] == 0.0
    (record,) = caplog.records
    assert "step 20: 10 steps in a row without a spread of rewards" in record.getMessage()


def test_what_earlier_runs_wrote_is_not_taken_for_this_ones(tmp_path):
    write(tmp_path / "logging.jsonl", TRAIN)
    write(tmp_path / "v0" / "logging.jsonl", TRAIN)
    write(tmp_path / "metrics.jsonl", {"step": 1})
    progress = JsonLinesProgress(tmp_path)
    assert progress() == {}
    assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "metrics.1.jsonl").exists()
    write(tmp_path / "logging.jsonl", TRAIN | {"global_step/max_steps": "4/6"})
    assert progress()["step"] == 4
    JsonLinesProgress(tmp_path)
    assert (tmp_path / "metrics.2.jsonl").exists()
