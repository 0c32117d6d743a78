"""Accumulated contrastive gradients are those of the whole batch."""

import pytest
import torch

from multimodal.datasets import Task
from multimodal.training.losses import LossOptions, loss_of
from shared.amp import Amp
from shared.distributed import World
from tests import multimodal_nano as nano

ALONE, CPU = World(), torch.device("cpu")
TASKS = {
    "pairs": Task("coco", nano.IMAGE_TEXT, True),
    "pairs and labels": Task("clotho", nano.AUDIO_TEXT, True, "keywords"),
    "labels": Task("coco", ("image",), False, "classes"),
    "hidden parts": Task("audiocaps", ("audio",), False, "spectrogram"),
}
ROWS = 6


def run(learner, task, size, kind="infonce", amp=None):
    """Loss, outputs and gradients of one batch in chunks of `size` rows, and what is drawn next."""
    batch = nano.inputs(ROWS)
    if learner.model.classifier.weight.dtype == torch.float64:
        batch = nano.double(batch)
    torch.manual_seed(7)
    loss, outputs = nano.step(learner, batch, task, size, LossOptions(kind), amp=amp)
    return loss, outputs, nano.gradients(learner), torch.rand(1).item()


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("task", TASKS)
def test_chunks_give_the_gradients_of_the_whole_batch(task, kind):
    whole = run(nano.learner(kind), TASKS[task], ROWS, kind)
    chunked = run(nano.learner(kind), TASKS[task], 2, kind)
    assert chunked[0].item() == pytest.approx(whole[0].item(), rel=1e-12)
    assert nano.largest_error(chunked[2], whole[2]) < 1e-10
    scales = [name for name in whole[2] if "logit_scale" in name or "logit_bias" in name]
    expected = 0 if task in ("labels", "hidden parts") else 1 if kind == "infonce" else 2
    assert len(scales) == expected  # of this pair alone, and exact as the rest
    for name in scales:
        assert chunked[2][name].item() == pytest.approx(whole[2][name].item(), rel=1e-9)
    for name, output in whole[1].items():
        torch.testing.assert_close(chunked[1][name], output, atol=1e-12, rtol=1e-10)


def test_dropout_draws_the_same_numbers_in_both_passes():
    """Against a graph kept over all chunks, which needs one pass and the memory of all of them."""
    task = TASKS["pairs and labels"]
    cached = run(nano.learner(dropout=0.3), task, 2)
    learner = nano.learner(dropout=0.3)
    batch = nano.double(nano.inputs(ROWS))
    labels = batch.pop("labels")
    torch.manual_seed(7)
    parts = [learner(nano.rows_of(batch, i, i + 2), task) for i in range(0, ROWS, 2)]
    joined = {
        name: torch.cat([part[name] for part in parts]) if value.ndim else value
        for name, value in parts[0].items()
    }
    loss_of(task, joined, labels, LossOptions(), ALONE)[0].backward()
    assert nano.largest_error(cached[2], nano.gradients(learner)) < 1e-10
    assert cached[3] == torch.rand(1).item()  # the stream goes on where one pass would end


def test_a_loss_scale_comes_in_once():
    amp = Amp("off", CPU)
    amp._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = run(nano.learner(), TASKS["pairs and labels"], 2, amp=amp)[2]
    plain = run(nano.learner(), TASKS["pairs and labels"], 2)[2]
    expected = {name: 1024 * gradient for name, gradient in plain.items()}
    assert nano.largest_error(scaled, expected) < 1e-12


def test_bf16_gradients_stay_close():
    whole, mixed = (
        run(nano.learner().float(), TASKS["pairs"], 2, amp=Amp(mode, CPU))[2]
        for mode in ("off", "bf16")
    )
    assert nano.largest_error(mixed, whole) < 0.05
