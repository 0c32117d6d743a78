"""`--replay STEP`: a step of a run once more, to the bit, and a page of what it was made of.

    cfg = replace(cfg, run=replay.settle(cfg, cfg.run_dir))      # in main, where --replay is typed
    ...
    if run.replays:                                              # in the loop, before the optimizer
        run.show(model, samples)

The training continues from the run's nearest checkpoint before the step, in a directory of its
own, replay_STEP/ in the run directory; of the run's own files none is written.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.config import HasRunOptions, RunOptions
from shared.errors import UserError
from shared.files import read_json_lines, read_object
from shared.launch import world_size
from shared.settings import differing, settings
from shared.status import loss_tag

if TYPE_CHECKING:
    from torch import Tensor, nn

PAGE = "replay.html"
_AROUND = 100  # steps before and after, in the chart


@dataclass(frozen=True)
class Sample:
    """One sample of the step: its losses by name, what it says, its picture as a PNG."""

    losses: Mapping[str, float]
    text: str
    picture: bytes = field(default=b"", repr=False)


def settle(cfg: HasRunOptions, run_dir: Path) -> RunOptions:
    """The options with which the run in `run_dir` is trained once more, in its own directory.

    Raises UserError when it holds no run with the settings of `cfg`, or none with that step.
    """
    step, stored = cfg.run.replay, read_object(run_dir / "config.json").get("identity")
    last = read_object(run_dir / "status.json").get("step")
    if not isinstance(stored, dict) or not isinstance(last, int):
        raise UserError(f"--replay {step}: {run_dir} holds no run; name its directory by --run-dir")
    there = stored.pop("world_size", None)
    if there != world_size():
        raise UserError(f"--replay {step}: the run has {there} process(es): type --nproc {there}")
    changed = differing(stored, settings(cfg, ("result", "length")))
    if changed:
        raise UserError(
            f"--replay {step}: the run in {run_dir} has other settings ({'; '.join(changed)}): "
            f"type its own command with --replay, or --resume {run_dir} --replay {step}"
        )
    if step is None or step > last:
        raise UserError(f"--replay {step}: the run in {run_dir} has {last} steps so far")
    return replace(cfg.run, run_dir=run_dir / f"replay_{step}", resume="never")


def nearest(run_dir: Path, step: int) -> Path | None:
    """The newest checkpoint of a run from before its step `step`; None: from the beginning."""
    from shared import checkpoint

    found: dict[int, Path] = {}
    for path in [*run_dir.glob("last*.pt*"), *run_dir.glob("**/*epoch_*.pt*")]:
        try:
            state = checkpoint.load(path) if "replay_" not in str(path.parent) else {}
        except (checkpoint.DamagedError, UserError):
            continue
        if {"position", "parts", "generators"} <= state.keys():
            found[state["position"]["step"]] = path
    return found.get(max((at for at in found if at < step), default=-1))


def gradient_norms(model: nn.Module, scale: float = 1.0) -> dict[str, float]:
    """The norm of the gradients in each child of `model`, from where it has several with any.

    scale: fp16's factor that is in them.
    """
    import torch

    prefix, inner = "", model
    while True:
        having = {n: child for n, child in inner.named_children() if list(_gradients(child))}
        if len(having) != 1:
            break
        name, inner = next(iter(having.items()))
        prefix += f"{name}."
    shown = having or {"": inner}
    return {
        prefix + name: float(torch.nn.utils.get_total_norm(list(_gradients(child)))) / scale
        for name, child in shown.items()
    }


def _gradients(module: nn.Module) -> Iterator[Tensor]:
    return (p.grad for p in module.parameters() if p.grad is not None)


def png(picture: Tensor) -> bytes:
    """A picture (3, H, W) of any range, stretched to black and white, as a PNG."""
    from PIL import Image

    exact = picture.detach().float().cpu()
    stretched = (exact - exact.min()) / (exact.max() - exact.min()).clamp(min=1e-6)
    written = io.BytesIO()
    pixels = (255 * stretched).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


def write_page(
    run_dir: Path,
    step: int,
    values: Mapping[str, float],
    norms: Mapping[str, float],
    samples: Sequence[Sample],
) -> str:
    """Write the page of a step into `run_dir`, a directory in the run's own; what it found.

    values: what the step logs, now. samples: those of all processes.
    """
    from shared.page import Page, Picture

    rows = [row for row in read_json_lines(run_dir.parent / "metrics.jsonl")
            if row.get("split") == "train"]  # fmt: skip
    logged = next((row for row in rows if row["step"] == step), {})
    found, colour = _verdict(step, values, logged)
    page = Page(f"Step {step} of {run_dir.parent.name}")
    page.banner(found, colour)
    shown = [(name, value, logged.get(name)) for name, value in values.items()]
    page.table(("value", "replayed", "logged"), shown)
    page.table(("gradients of", "norm before clipping"), norms.items())
    near = [row for row in rows if abs(row["step"] - step) <= _AROUND]
    tag = loss_tag(dict(values))
    lines = {tag: ([row["step"] for row in near], [row.get(tag) for row in near])}
    page.chart("the loss around this step", lines, borders={step: "this step"})
    page.section(f"The {len(samples)} samples, the highest loss first")
    names = list(dict.fromkeys(name for sample in samples for name in sample.losses))
    cells = [
        (Picture(sample.picture, sample.text) if sample.picture else None, sample.text,
         *(sample.losses.get(name) for name in names))
        for sample in sorted(samples, key=lambda sample: -sum(sample.losses.values()))
    ]  # fmt: skip
    page.table(("picture", "text", *names), cells)
    page.write(run_dir / PAGE)
    return f"{found}; the page is {run_dir / PAGE}"


def _verdict(step: int, values: Mapping[str, float], logged: Mapping[str, Any]) -> tuple[str, str]:
    """Whether the step is the one that was logged, and the colour of that."""
    tag = loss_tag(dict(values))
    now, then = values[tag], logged.get(tag)
    if then is None:
        return f"step {step} replayed: {tag} {now!r}; the run did not log this step", "open"
    if now == then:
        return f"step {step} replayed: {tag} {now!r}, as logged to the bit", "good"
    return f"step {step} replayed: {tag} {now!r}, NOT the {then!r} that was logged", "bad"
