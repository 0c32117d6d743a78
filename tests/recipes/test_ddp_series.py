"""shared/ddp_series: its steps, their snapshots and mistakes; the character model."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim import SGD

from tests.harness import ROOT, Outcome, environment, free_port, start

SERIES = ROOT / "shared" / "ddp_series"
sys.path.append(str(SERIES))  # where a script that is started finds datautils
from shared.ddp_series import (
    multigpu,
    multigpu_profile,
    multigpu_torchrun,
    multinode_torchrun,
    single_gpu,
)
from shared.ddp_series.datautils import MyTrainDataset
from shared.ddp_series.mingpt import char_dataset
from shared.ddp_series.mingpt import model as gpt_model
from shared.ddp_series.mingpt.make_text import make_text

sys.path.remove(str(SERIES))

WITH_SNAPSHOT = [multigpu_torchrun, multinode_torchrun]
STEPS = [single_gpu, multigpu, multigpu_profile, *WITH_SNAPSHOT]
SCRIPTS = [*(f"{step.__name__.rpartition('.')[2]}.py" for step in STEPS), "mingpt/train.py"]


def run(step: ModuleType, folder: Path, *args: object) -> Outcome:
    """A step as one process, in this one, with its files in `folder`."""
    folder.mkdir(exist_ok=True)
    kind = "snapshot" if step in WITH_SNAPSHOT else "checkpoint"
    words = [*map(str, args), "--batch_size", "128", f"--{kind}_path", str(folder / f"{kind}.pt")]
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    torchrun |= {"MASTER_PORT": str(free_port()), "TORCHELASTIC_RESTART_COUNT": "0"}
    stream, code = io.StringIO(), 0
    with mock.patch.dict(os.environ, torchrun), contextlib.redirect_stdout(stream):
        try:
            if step in (multigpu, multigpu_profile):
                store = folder / "store"
                step.train(0, 1, f"file://{store}", step.parse_args(words))
                store.unlink(missing_ok=True)
            else:
                step.main(words)
        except SystemExit as error:
            code = error.code
            if not isinstance(code, int):
                print(code)
                code = 1
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return Outcome(code, stream.getvalue())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a step has left in `folder`."""
    if (folder / "snapshot.pt").exists():
        return torch.load(folder / "snapshot.pt", weights_only=True)["MODEL_STATE"]
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two models agree to the bit."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def epochs(text: str) -> dict[int, str]:
    """{epoch: loss} of the lines that a step has printed."""
    found = re.findall(r"Epoch (\d+) \| Loss: (\S+)", text)
    assert len(dict(found)) == len(found), f"an epoch was run twice:\n{text}"
    return {int(epoch): loss for epoch, loss in found}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As a run of its own has: sums in another order give other digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def with_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the user's own, which draws random numbers in every training step."""

    def load_train_objs() -> tuple[MyTrainDataset, nn.Module, SGD]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 64), nn.Dropout(0.2), nn.Linear(64, 1))
        return MyTrainDataset(2048), model, SGD(model.parameters(), lr=0.05, momentum=0.9)

    for step in STEPS:
        monkeypatch.setattr(step, "load_train_objs", load_train_objs)


@pytest.mark.usefixtures("with_dropout")
def test_every_step_ends_with_the_same_weights(tmp_path):
    for step in STEPS:
        extra = ["--trace_dir", tmp_path / "traces"] if step is multigpu_profile else []
        outcome = run(step, tmp_path / step.__name__, 2, 2, *extra)
        assert outcome.code == 0, outcome.text
        assert same(weights(tmp_path / step.__name__), weights(tmp_path / single_gpu.__name__))


def test_the_series_learns(tmp_path):
    found = epochs(run(single_gpu, tmp_path, 50, 50).text)
    variance = float(MyTrainDataset(2048).targets.var())  # the loss of always guessing the mean
    assert float(found[0]) > variance / 10
    assert float(found[49]) < variance / 50


@pytest.mark.parametrize(("total", "every", "saved"), [(4, 2, [1, 3]), (3, 2, [1, 2]), (1, 5, [0])])
def test_it_saves_every_few_epochs_and_after_the_last(tmp_path, total, every, saved):
    text = run(single_gpu, tmp_path, total, every).text
    assert [int(epoch) for epoch in re.findall(r"Epoch (\d+) \| Checkpoint", text)] == saved


@pytest.mark.usefixtures("with_dropout")
@pytest.mark.parametrize("step", WITH_SNAPSHOT)
def test_two_epochs_and_two_more_are_four_and_stay_so(tmp_path, step):
    whole = epochs(run(step, tmp_path / "whole", 4, 1).text)
    first = epochs(run(step, tmp_path / "parts", 2, 1).text)
    snapshot = torch.load(tmp_path / "parts" / "snapshot.pt", weights_only=True)
    assert snapshot.keys() == {"MODEL_STATE", "OPTIMIZER_STATE", "EPOCHS_RUN"}
    assert snapshot["EPOCHS_RUN"] == 2
    assert list(snapshot["MODEL_STATE"]) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    then = epochs(run(step, tmp_path / "parts", 4, 1).text)
    assert (sorted(first), sorted(then)) == ([0, 1], [2, 3]), "an epoch was repeated or left out"
    assert first | then == whole
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    finished = (tmp_path / "parts" / "snapshot.pt").read_bytes()
    again = run(step, tmp_path / "parts", 4, 1)
    assert again.code == 0 and epochs(again.text) == {} and "at Epoch 4" in again.text
    assert (tmp_path / "parts" / "snapshot.pt").read_bytes() == finished


@pytest.mark.parametrize("step", WITH_SNAPSHOT)
def test_save_that_fails_half_way_leaves_the_old_snapshot(tmp_path, monkeypatch, step):
    run(step, tmp_path, 2, 1)
    before = (tmp_path / "snapshot.pt").read_bytes()

    def full_disk(_file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            run(step, tmp_path, 3, 1)
    assert (tmp_path / "snapshot.pt").read_bytes() == before
    assert sorted(epochs(run(step, tmp_path, 3, 1).text)) == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot.pt"]


@pytest.mark.parametrize("step", WITH_SNAPSHOT)
def test_weights_alone_are_no_snapshot(tmp_path, step):
    run(multigpu, tmp_path, 1, 1)
    (tmp_path / "checkpoint.pt").rename(tmp_path / "snapshot.pt")
    outcome = run(step, tmp_path, 2, 1)
    assert outcome.code == 1
    assert f"{tmp_path / 'snapshot.pt'} is not a snapshot of this script" in outcome.last_line


@pytest.fixture
def typed(tmp_path) -> Callable[..., Outcome]:
    """Types a script's name and words; it must end before it imports torch."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    env = environment(PYTHONPATH=str(tmp_path))

    def run_it(script: str, *args: object) -> Outcome:
        words = [sys.executable, str(SERIES / script), *map(str, args)]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        return Outcome(done.returncode, done.stdout + done.stderr)

    return run_it


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_torch_and_fits_80_columns(typed, script):
    outcome = typed(script, "--help")
    assert outcome.code == 0, outcome.text
    assert "--batch_size" in outcome.text
    assert max(map(len, outcome.text.splitlines())) <= 80


MISTAKES = [
    ([5], "required: save_every"),
    ([5, 0], "save_every must be 1 or more, got 0"),
    ([0, 1], "total_epochs must be 1 or more, got 0"),
    (["five", 1], "total_epochs: invalid int value: 'five'"),
    ([5, 1, "--batch_sise", 8], "unrecognized arguments: --batch_sise"),
    ([5, 1, "--batch-size", -1], "batch_size must be 1 or more, got -1"),
    ([5, 1, "--{kind}-path", "/none/x.pt"], "{kind}_path /none/x.pt: there is no such directory"),
]


@pytest.mark.parametrize("step", STEPS)
def test_mistakes_are_told_and_exit_2(step, monkeypatch, capsys):
    kind = "snapshot" if step in WITH_SNAPSHOT else "checkpoint"
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # not started by torchrun
    alone = [([5, 1], "start it with torchrun --standalone --nproc_per_node=2")]
    for args, said in [*MISTAKES, *(alone if step in WITH_SNAPSHOT else [])]:
        with pytest.raises(SystemExit) as ended:
            step.parse_args([str(word).format(kind=kind) for word in args])
        assert ended.value.code == 2
        assert said.format(kind=kind) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("step", [multigpu, multigpu_profile])
def test_more_processes_than_gpus_are_refused(monkeypatch, capsys, step):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit) as error:
        step.main(["1", "1", "--nproc", "2"])
    assert error.value.code == 2
    assert "--nproc 2: there are 1 GPUs" in capsys.readouterr().err


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


@pytest.mark.slow
@pytest.mark.limit(240)
def test_two_processes_train_as_one_on_the_same_global_batch(tmp_path):
    two = [SERIES / "multigpu.py", 4, 4, "--nproc", 2, "--batch_size", 64]
    with start([*two, "--checkpoint_path", tmp_path / "two.pt"]) as running:
        outcome = running.finish(200)
        assert outcome.code == 0, outcome.text
        assert running.leaves_nothing()
    assert run(single_gpu, tmp_path, 4, 4).code == 0  # 128 samples a step
    left = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    right = torch.load(tmp_path / "two.pt", weights_only=True, map_location="cpu")
    assert left.keys() == right.keys()
    worst = max(float((left[key].cpu() - right[key]).abs().max()) for key in left)
    print(f"largest difference of a weight after 64 steps: {worst:.1e}")
    assert worst < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.limit(240)
@pytest.mark.parametrize("step", WITH_SNAPSHOT)
def test_on_gpus_the_processes_meet_over_nccl_and_continue_from_the_snapshot(tmp_path, step):
    script = SERIES / f"{step.__name__.rpartition('.')[2]}.py"
    snapshot = tmp_path / "snapshot.pt"
    for total in (2, 4):
        words = ["--standalone", "--nproc_per_node=gpu", script, total, 1]
        command = [*words, "--snapshot_path", snapshot]
        with start(command, program=[Path(sys.executable).with_name("torchrun")]) as running:
            outcome = running.finish(200)
        assert outcome.code == 0, outcome.text
    assert "at Epoch 2" in outcome.text
    assert torch.load(snapshot, weights_only=True)["MODEL_STATE"]["0.weight"].is_cuda


# The character model


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    block = gpt_model.Block(width=8, heads=2).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    query, key, value = block.query_key_value(block.norm1(x))[0].split(8, dim=1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = query[:, part] @ key[:, part].T / math.sqrt(4)
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ value[:, part])
    expected = x[0] + block.projection(torch.cat(heads, 1))
    expected = expected + block.feed_forward(block.norm2(expected))
    assert torch.allclose(block(x)[0], expected, atol=1e-12)


def test_held_out_loss_is_the_mean_over_all_characters():
    torch.manual_seed(0)
    gpt = gpt_model.GPT(vocab_size=7, block_size=8, layers=1, heads=2, width=16)
    tokens, targets = torch.randint(7, (5, 8)), torch.randint(7, (5, 8))
    batches = [(tokens[:3], targets[:3]), (tokens[3:], targets[3:])]  # of different sizes
    expected = gpt_model.cross_entropy(gpt, tokens, targets).item()
    found = gpt_model.evaluate(gpt, batches, torch.device("cpu"))
    assert found == pytest.approx(expected, abs=1e-6)


def test_text_that_is_shipped_is_the_one_that_the_grammar_writes():
    text = (SERIES / "mingpt" / "text.txt").read_text(encoding="utf-8")
    assert text == make_text(seed=0, length=60_000)


def test_unigram_entropy_is_that_of_the_frequencies():
    tokens = torch.tensor([0, 0, 1, 3])  # 1/2, 1/4, 0, 1/4
    expected = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert char_dataset.unigram_entropy(tokens) == pytest.approx(expected)


def test_blocks_hold_the_text_and_the_character_after_each():
    text = char_dataset.encode("abcdefghij" * 10, block_size=4)
    assert text.vocabulary == list("abcdefghij")
    assert len(text.train) == (90 - 1) // 4
    tokens, targets = text.held_out[1]
    assert tokens.tolist() == [4, 5, 6, 7]
    assert targets.tolist() == [5, 6, 7, 8]
    starts = {int(text.train[0][0][0]) for _ in range(50)}
    assert starts == {0, 1, 2, 3}
    for index in range(len(text.train)):
        assert text.train[index][0].shape == text.train[index][1].shape == (4,)


GPT_EPOCHS = 4


def gpt_words(folder: Path) -> list[object]:
    """mingpt/train.py on a short text: 29 training steps an epoch."""
    path = folder / "text.txt"
    path.write_text(make_text(seed=1, length=16_000), encoding="utf-8")
    flags = ["--width", 32, "--block_size", 32, "--epochs", GPT_EPOCHS, "--data", path]
    return [SERIES / "mingpt" / "train.py", *flags, "--snapshot_path", folder / "snapshot.pt"]


def gpt(folder: Path, *more: object) -> str:
    """The same in this process; what it has printed."""
    words, stream = [str(word) for word in (*gpt_words(folder), *more)], io.StringIO()
    own = ("char_dataset", "model", "snapshot")  # beside it, and under these names others' too
    others = {name: sys.modules.pop(name) for name in own if name in sys.modules}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stream):
        patch.setattr(sys, "argv", words)
        patch.syspath_prepend(str(SERIES / "mingpt"))
        try:
            runpy.run_path(words[0], run_name="__main__")
        finally:
            for name in own:
                sys.modules.pop(name, None)
            sys.modules.update(others)
    return stream.getvalue()


@pytest.fixture(scope="module")
def trained_gpt(tmp_path_factory) -> tuple[Path, str]:
    """The snapshot of an undisturbed training, and what it has printed."""
    folder = tmp_path_factory.mktemp("gpt")
    return folder / "snapshot.pt", gpt(folder)


def nats(text: str) -> tuple[float, float]:
    found = re.search(r"Nats per character: (\S+) without context, (\S+) held out", text)
    assert found, text
    return float(found[1]), float(found[2])


def test_character_model_learns_more_than_how_often_characters_occur(trained_gpt):
    _, text = trained_gpt
    before, after = nats(text)
    assert after < 0.8 * before
    assert len(text.partition("held out\n")[2]) > 300  # a sample


def test_character_model_that_is_killed_continues_to_the_same_end(tmp_path, trained_gpt):
    whole, text = trained_gpt
    with start(gpt_words(tmp_path)) as running:
        running.wait_for_text("Epoch 1 |")
        running.kill()
    then = gpt(tmp_path)
    assert "Epoch 0 |" not in then
    assert nats(then) == nats(text)
    left, right = (
        torch.load(path, weights_only=True) for path in (whole, tmp_path / "snapshot.pt")
    )
    assert left["epochs_run"] == right["epochs_run"] == GPT_EPOCHS
    assert same(left["model"], right["model"])


def test_character_model_trains_in_mixed_precision(tmp_path):
    before, after = nats(gpt(tmp_path, "--amp"))
    assert after < before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--data", "{tmp}/none.txt"], "is not a UTF-8 text"),
        (["--data", "{tmp}/short.txt"], "20 blocks"),
        (["--lr", -0.1], "lr must be above 0, got -0.1"),
        (["--heads", 3], "heads 3 must divide width 64"),
        (["--snapshot-path", "{tmp}/none/x.pt"], "x.pt: there is no such directory"),
    ],
)
def test_what_makes_no_character_model_is_refused(typed, tmp_path, args, said):
    (tmp_path / "short.txt").write_text("too short")
    outcome = typed("mingpt/train.py", *(str(word).format(tmp=tmp_path) for word in args))
    assert outcome.code == 2
    assert said in outcome.last_line
