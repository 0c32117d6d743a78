"""shared/ddp_series in this process: the ladder, its snapshots, the character model."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from shared import checkpoint
from shared.ddp_series import (
    multigpu,
    multigpu_profile,
    multigpu_torchrun,
    multinode_torchrun,
    single_gpu,
)
from shared.ddp_series.datautils import MyTrainDataset
from shared.ddp_series.mingpt import char_dataset, train
from shared.ddp_series.mingpt import model as gpt_model
from shared.ddp_series.mingpt.make_text import make_text
from tests.harness import ROOT, Outcome, losses, run_here, start, status_of

SERIES = ROOT / "shared" / "ddp_series"
WITH_SNAPSHOT = [multigpu_torchrun, multinode_torchrun]
LADDER = [single_gpu, multigpu, multigpu_profile, *WITH_SNAPSHOT]
STEPS = 16  # an epoch's, with the batch below
FLAGS = ("--batch_size", 128, "--dropout", 0.2, "--device", "cpu")


def run(step, folder: Path, *args: object) -> Outcome:
    """A step of the ladder in this process, with its files in `folder`."""
    folder.mkdir(exist_ok=True)
    if step in WITH_SNAPSHOT:
        args = (*args, "--snapshot-path", folder / "snapshot.pt")
    else:
        args = (*args, "--checkpoint-path", folder / "checkpoint.pt")
    return run_here(step.main, [*args, *FLAGS])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a step has left in `folder`."""
    if (folder / "snapshot.pt").exists():
        return checkpoint.load(folder / "snapshot.pt")["parts"]["model"]
    return checkpoint.load(folder / "checkpoint.pt")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two models agree to the bit."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def epochs(text: str) -> dict[int, str]:
    """{epoch: loss} of the lines that a step has logged."""
    found = re.findall(r"epoch (\d+), step \d+: loss (\S+)", text)
    assert len(dict(found)) == len(found), f"an epoch was run twice:\n{text}"
    return {int(epoch): loss for epoch, loss in found}


def test_every_step_ends_with_the_same_weights(tmp_path):
    for step in LADDER:
        name = step.__name__.rpartition(".")[2]
        extra = ["--no-profile"] if step is multigpu_profile else []
        outcome = run(step, tmp_path / name, 2, 2, *extra)
        assert outcome.code == 0, outcome.text
        assert same(weights(tmp_path / name), weights(tmp_path / "single_gpu")), name


def test_the_series_learns(tmp_path):
    args = [15, 15, "--device", "cpu", "--checkpoint-path", tmp_path / "checkpoint.pt"]
    outcome = run_here(single_gpu.main, args)
    found = {epoch: float(loss) for epoch, loss in epochs(outcome.text).items()}
    variance = float(MyTrainDataset(2048).targets.var())  # the loss of always guessing the mean
    assert found[1] > variance / 10
    assert found[15] < variance / 50, outcome.text


def test_the_data_are_the_same_in_every_process():
    first, second = MyTrainDataset(64), MyTrainDataset(64)
    assert torch.equal(first.points, second.points)
    assert torch.equal(first.targets, second.targets)
    assert first[3][0].shape == (20,)
    assert first[3][1].shape == (1,)


@pytest.mark.parametrize("step", WITH_SNAPSHOT)
def test_two_epochs_and_two_more_are_four(tmp_path, step):
    whole = epochs(run(step, tmp_path / "whole", 4, 1).text)
    first = epochs(run(step, tmp_path / "parts", 2, 1).text)
    then = epochs(run(step, tmp_path / "parts", 4, 1).text)
    assert sorted(first) == [1, 2]
    assert sorted(then) == [3, 4], "an epoch was repeated or left out"
    assert first | then == whole
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_finished_training_says_so_and_stays_as_it_is(tmp_path):
    run(multigpu_torchrun, tmp_path, 2, 1)
    before = (tmp_path / "snapshot.pt").read_bytes()
    outcome = run(multigpu_torchrun, tmp_path, 2, 1)
    assert outcome.code == 0
    assert epochs(outcome.text) == {}
    assert "epoch=2, batch=0), up to epoch 2" in outcome.text
    assert (tmp_path / "snapshot.pt").read_bytes() == before


def test_snapshot_holds_all_that_the_next_step_depends_on(tmp_path):
    run(multigpu_torchrun, tmp_path, 2, 1)
    snapshot = checkpoint.load(tmp_path / "snapshot.pt")
    assert snapshot["parts"].keys() == {"model", "optimizer", "schedule"}
    assert snapshot["position"] == {"step": 2 * STEPS, "epoch": 2, "batch": 0}
    momentum = snapshot["parts"]["optimizer"]["state"][0]["momentum_buffer"]
    assert float(momentum.abs().sum()) > 0
    assert snapshot["parts"]["schedule"]["last_epoch"] == 2
    assert snapshot["generators"][0].keys() == {"torch", "cuda", "numpy", "python"}


def stop_at(monkeypatch: pytest.MonkeyPatch, step, number: int) -> None:
    """Have the process get SIGTERM in the middle of a step."""
    plain = step.Trainer._run_batch

    def run_batch(self, source, targets) -> None:
        plain(self, source, targets)
        if self.position.step == number:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(step.Trainer, "_run_batch", run_batch)


@pytest.mark.parametrize("step", WITH_SNAPSHOT)
def test_sigterm_in_an_epoch_saves_and_the_same_command_goes_on_to_the_bit(
    tmp_path, monkeypatch, step
):
    whole = epochs(run(step, tmp_path / "whole", 3, 3).text)
    with monkeypatch.context() as patch:
        stop_at(patch, step, STEPS + 1)
        outcome = run(step, tmp_path / "parts", 3, 3)
    assert outcome.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    position = checkpoint.load(tmp_path / "parts" / "snapshot.pt")["position"]
    assert position == {"step": 20, "epoch": 1, "batch": 4}  # the next look at the signal
    resumed = run(step, tmp_path / "parts", 3, 3)
    assert resumed.code == 0, resumed.text
    assert epochs(resumed.text) == {epoch: whole[epoch] for epoch in (2, 3)}
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_smaller_steps_go_on_at_the_same_sample(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, multigpu_torchrun, STEPS + 1)
        assert run(multigpu_torchrun, tmp_path, 2, 2).code == 143
    seen = []
    plain = multigpu_torchrun.Trainer._run_batch

    def run_batch(self, source, targets) -> None:
        seen.append(len(source))
        plain(self, source, targets)

    monkeypatch.setattr(multigpu_torchrun.Trainer, "_run_batch", run_batch)
    args = [2, 2, "--snapshot-path", tmp_path / "snapshot.pt", "--batch-size", 64]
    assert run_here(multigpu_torchrun.main, args).code == 0
    assert seen == [64] * ((2048 - 4 * 128) // 64)


def test_torn_snapshot_falls_back_to_the_one_before(tmp_path):
    whole = run(multigpu_torchrun, tmp_path / "whole", 4, 1)
    run(multigpu_torchrun, tmp_path / "torn", 3, 1)
    last = tmp_path / "torn" / "snapshot.pt"
    last.write_bytes(last.read_bytes()[:1000])
    outcome = run(multigpu_torchrun, tmp_path / "torn", 4, 1)
    assert outcome.code == 0, outcome.text
    assert "passed over" in outcome.text
    assert sorted(epochs(outcome.text)) == [3, 4]
    assert epochs(outcome.text)[4] == epochs(whole.text)[4]
    assert same(weights(tmp_path / "torn"), weights(tmp_path / "whole"))


def test_weights_alone_are_no_snapshot(tmp_path):
    run(multigpu, tmp_path, 1, 1)
    path = tmp_path / "checkpoint.pt"
    outcome = run_here(multigpu_torchrun.main, [2, 1, "--snapshot-path", path])
    assert outcome.code == 2
    assert f"{path} lacks model, optimizer, schedule" in outcome.last_line


@pytest.mark.parametrize("step", LADDER)
@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([5], "save_every"),
        ([5, 0], "save_every must be 1 or more, got 0"),
        (["five", 1], "total_epochs"),
        ([5, 1, "--batch_sise", 8], "--batch-size"),
        ([5, 1, "--batch_size", 0], "a batch of 0 samples"),
        ([5, 1, "--batch_size", 4096], "2048 samples are too few"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, step, args, said):
    outcome = run_here(step.main, args)
    assert outcome.code == 2, outcome.text
    assert said in outcome.last_line
    assert "Traceback" not in outcome.text


@pytest.mark.parametrize("step", LADDER)
def test_directory_that_is_not_there_is_refused_before_training(tmp_path, step):
    flag = "--snapshot-path" if step in WITH_SNAPSHOT else "--checkpoint-path"
    outcome = run_here(step.main, [5, 1, flag, tmp_path / "none" / "x.pt"])
    assert outcome.code == 2
    assert "there is no such directory" in outcome.last_line
    assert "epoch" not in outcome.text.replace(outcome.last_line, "")


def test_profiler_writes_a_trace_that_shows_the_step(tmp_path):
    outcome = run(multigpu_profile, tmp_path, 1, 1, "--trace-dir", tmp_path / "traces")
    assert outcome.code == 0, outcome.text
    assert "Optimizer.step#SGD.step" in outcome.text
    (path,) = (tmp_path / "traces").iterdir()
    assert path.name.startswith("rank0.")
    assert path.name.endswith(".pt.trace.json")
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) >= 6
    assert any("addmm" in name for name in names)


def test_without_profile_no_trace_is_written(tmp_path):
    flags = ["--no-profile", "--trace-dir", tmp_path / "traces"]
    assert run(multigpu_profile, tmp_path, 1, 1, *flags).code == 0
    assert not (tmp_path / "traces").exists()


@pytest.mark.slow
@pytest.mark.limit(180)
def test_two_processes_train_as_one_on_the_same_global_batch(tmp_path):
    flags = ["--device", "cpu", "--checkpoint-path"]
    two = [SERIES / "multigpu.py", 4, 4, "--nproc", 2, "--batch_size", 16, *flags]
    with start([*two, tmp_path / "two.pt"]) as running:
        outcome = running.finish()
        assert outcome.code == 0, outcome.text
        assert running.leaves_nothing()
    one = [4, 4, "--batch_size", 32, *flags, tmp_path / "one.pt"]
    assert run_here(single_gpu.main, one).code == 0
    left, right = checkpoint.load(tmp_path / "one.pt"), checkpoint.load(tmp_path / "two.pt")
    assert left.keys() == right.keys()
    worst = max(float((left[key] - right[key]).abs().max()) for key in left)
    print(f"largest difference of a weight after 256 steps: {worst:.1e}")
    assert worst < 1e-6


# The character model

NANO = ("--width", 32, "--block-size", 32, "--batch-size", 16, "--device", "cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A short text: 28 steps an epoch."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(seed=1, length=16_000), encoding="utf-8")
    return path


def test_attention_sees_nothing_of_what_follows():
    torch.manual_seed(0)
    gpt = gpt_model.GPT(characters=7, block_size=8, layers=2, heads=2, width=16, dropout=0.0)
    codes = torch.randint(7, (1, 8))
    changed = codes.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 7
    before, after = gpt(codes), gpt(changed)
    assert torch.equal(before[0, :5], after[0, :5])
    assert not torch.allclose(before[0, 5:], after[0, 5:])
    assert before.shape == (1, 8, 7)


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    block = gpt_model.Block(width=8, heads=2, dropout=0.0).double().eval()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    query, key, value = block.query_key_value(block.before_attention(x))[0].split(8, dim=1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = query[:, part] @ key[:, part].T / math.sqrt(4)
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ value[:, part])
    expected = x[0] + block.mix(torch.cat(heads, 1))
    expected = expected + block.feed(block.before_feed(expected))
    assert torch.allclose(block(x)[0], expected, atol=1e-12)


def test_only_matrices_decay():
    gpt = gpt_model.GPT(characters=7, block_size=8, layers=1, heads=2, width=16, dropout=0.0)
    decayed, kept = gpt_model.parameter_groups(gpt, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(gpt.parameters()))


def test_generated_text_begins_with_the_prompt_and_outgrows_the_block():
    torch.manual_seed(0)
    gpt = gpt_model.GPT(characters=7, block_size=8, layers=1, heads=2, width=16, dropout=0.0)
    prompt = torch.tensor([1, 2, 3])
    written = gpt_model.generate(gpt, prompt, 20)
    assert written.shape == (23,)
    assert torch.equal(written[:3], prompt)
    assert int(written.max()) < 7


def test_text_that_is_shipped_is_the_one_that_the_grammar_writes():
    assert train.TEXT.read_text(encoding="utf-8") == make_text(seed=0, length=60_000)


def test_unigram_entropy_is_that_of_the_shares():
    codes = torch.tensor([0, 0, 1, 3])  # shares 1/2, 1/4, 0, 1/4
    expected = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert char_dataset.unigram_entropy(codes) == pytest.approx(expected)


def test_blocks_hold_the_text_and_the_character_after_each():
    text = char_dataset.encode("abcdefghij" * 10, block_size=4)
    assert text.alphabet == list("abcdefghij")
    assert len(text.learned) == (90 - 1) // 4
    codes, following = text.held_out[1]
    assert codes.tolist() == [4, 5, 6, 7]
    assert following.tolist() == [5, 6, 7, 8]
    starts = {int(text.learned[0][0][0]) for _ in range(50)}
    assert starts == {0, 1, 2, 3}
    for index in range(len(text.learned)):
        assert text.learned[index][0].shape == text.learned[index][1].shape == (4,)


@pytest.mark.limit(60)
def test_character_model_learns_more_than_how_often_characters_occur(tmp_path, text):
    flags = [*NANO, "--data", text, "--epochs", 4, "--run-dir", tmp_path / "run"]
    outcome = run_here(train.main, flags)
    assert outcome.code == 0, outcome.text
    result = status_of(tmp_path / "run")["result"]
    print(result)
    assert result["after"] < 0.8 * result["before"]
    assert "a sample:\n" in outcome.text


def test_character_model_continues_to_the_bit_after_sigterm(tmp_path, text, monkeypatch):
    flags = [*NANO, "--data", text, "--epochs", 1, "--log-every", 1, "--dropout", 0.1, "--run-dir"]
    assert run_here(train.main, [*flags, tmp_path / "whole"]).code == 0
    plain, calls = gpt_model.loss_of, []

    def loss_of(*args):
        calls.append(args)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(gpt_model, "loss_of", loss_of)
        assert run_here(train.main, [*flags, tmp_path / "parts"]).code == 143
    assert max(losses(tmp_path / "parts")) == 20
    assert run_here(train.main, [*flags, tmp_path / "parts"]).code == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    left, right = (checkpoint.load(tmp_path / name / "snapshot.pt") for name in ("whole", "parts"))
    assert same(left["parts"]["model"], right["parts"]["model"])


def test_character_model_trains_in_mixed_precision(tmp_path, text):
    flags = [*NANO, "--data", text, "--epochs", 1, "--amp", "bf16", "--run-dir", tmp_path / "run"]
    assert run_here(train.main, flags).code == 0
    result = status_of(tmp_path / "run")["result"]
    assert result["after"] < result["before"]


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no UTF-8 text"), (b"\xff\xfe\x00", "no UTF-8 text"), (b"too short", "20 blocks")],
)
def test_text_that_cannot_be_learned_from_is_refused(tmp_path, content, said):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    outcome = run_here(train.main, ["--data", path])
    assert outcome.code == 2
    assert said in outcome.last_line


def test_character_model_has_at_most_200_lines_of_code():
    """Data, model and training together; docstrings, comments and blank lines are not counted."""
    assert sum(map(code_lines, ("char_dataset.py", "model.py", "train.py"))) <= 200


def code_lines(name: str) -> int:
    source = (SERIES / "mingpt" / name).read_text()
    texts = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    return sum(
        number not in texts and text.strip() != "" and not text.lstrip().startswith("#")
        for number, text in enumerate(source.splitlines(), 1)
    )
