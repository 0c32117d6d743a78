"""`--prove`: whether a training keeps, with the user's data and settings, what every training must.

    return prove.prove(cfg.run, cfg.run_dir, ("student",), [
        Case("one = 2 processes", ["--nproc", 1], ["--nproc", 2]), …])

Each side of a case is the user's own command with a few flags more: real processes train six steps
in a directory of their own. The losses, trained weights and optimizer states of the two sides are
compared. proof.json in the run directory has the figures.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shared import stop
from shared.child import Child
from shared.config import RunOptions
from shared.device import present_gpus, visible_gpus
from shared.errors import DONE, FAILED, UserError
from shared.files import read_json_lines, read_text, write_json
from shared.launch import world_size
from shared.status import loss_tag

STEPS, INTERRUPTED_AT = 6, 3
# the largest relative errors of losses and weights, and of optimizer states, which are gradients
EXACT = (0.0, 0.0)
CLOSE = (1e-3, 0.05)  # other orders of float32 sums, over six steps
NEAR = (0.1, 2.0)  # rounding to bfloat16
_COLUMNS = ("losses", "weights", "optimizer")


@dataclass(frozen=True)
class Case:
    """A promise: the user's command trains with the flags `one` as it does with `other`.

    bounds: EXACT (equal to the bit), CLOSE or NEAR. why_not: why it cannot be tried.
    """

    name: str
    one: Sequence[object] = ()
    other: Sequence[object] = ()
    bounds: tuple[float, float] = CLOSE
    why_not: str = ""


@dataclass(frozen=True)
class Row:
    """What a case has shown: the largest relative errors; None where nothing was compared."""

    case: str
    losses: float | None = None
    weights: float | None = None
    optimizer: float | None = None
    bounds: tuple[float, float] = CLOSE
    holds: bool = True
    said: str = "ok"

    def __str__(self) -> str:
        numbers = (getattr(self, name) for name in _COLUMNS)
        texts = ["-" if number is None else _short(number) for number in numbers]
        bounds = "-" if self.losses is None else " ".join(map(_short, self.bounds))
        return _line(self.case, [*texts, bounds], self.said)


def _short(number: float) -> str:
    return f"{number:.0e}" if number else "0"


def _line(name: str, texts: Sequence[str], said: str) -> str:
    *errors, bounds = texts
    return f"{name:24}" + "".join(f"{text:>10}" for text in errors) + f"  {bounds:12} {said}"


def most_processes(options: RunOptions) -> tuple[int, str]:
    """How many processes to hold against one; and why they cannot be tried here, or ""."""
    visible = 0 if options.device == "cpu" else visible_gpus(os.environ, present_gpus())
    alone = visible == 1 or ":" in options.device
    return max(2, world_size()), "it needs two GPUs" if alone else ""


def bounds_of(dtype: str, options: RunOptions) -> tuple[float, float]:
    """What equal trainings may differ by with frozen weights of this dtype; auto: half on a GPU."""
    on_gpu = options.device != "cpu" and visible_gpus(os.environ, present_gpus())
    return CLOSE if dtype == "float32" or (dtype == "auto" and not on_gpu) else NEAR


def accumulated(
    options: RunOptions,
    plain: Sequence[object],
    batch: tuple[str, int],
    times: tuple[str, int],
    bounds: tuple[float, float] = CLOSE,
) -> list[Case]:
    """For trainings that accumulate: one = N processes, and whole = accumulated batches.

    plain: flags of all sides. batch, times: the flags of the samples of a forward pass, 2 or more,
    and of the passes of a step, with their values; both count for one process.
    """
    (size_flag, size), (times_flag, count) = batch, times
    number, why_not = most_processes(options)
    part = size // 2 if size % 2 == 0 else 1
    pieces = [size_flag, part, times_flag, count * (size // part)]
    one = [*plain, "--nproc", 1, times_flag, number * count]
    return [
        Case(f"one = {number} processes", one, [*plain, "--nproc", number], bounds, why_not),
        Case("whole = accumulated", plain, [*plain, *pieces], bounds),
    ]


def prove(
    options: RunOptions,
    run_dir: Path,
    trained: Sequence[str],
    cases: Sequence[Case],
    always: Sequence[object] = (),
) -> int:
    """Try the cases, and that an interrupted run continues to the bit: 0, or 1 when one fails.

    trained: the parts of a checkpoint that hold trained weights. always: flags of every side;
    `{here}` in a flag is the side's directory. Raises UserError where we cannot start processes.
    """
    if "RANK" in os.environ or options.processes.nnodes > 1 or options.is_explicit_resume:
        raise UserError(
            "--prove starts its processes itself, on one host and from the first step: type it "
            "without torchrun, --nnodes and --resume PATH"
        )
    rows = list[Row]()
    with Child() as child:
        sides = _Sides(run_dir / "prove", trained, always, child)
        _say(f"{STEPS} steps a side, in {sides.place}; largest relative errors:")
        _say(_line("case", [*_COLUMNS, "bounds"], ""))
        for case in [*cases, Case("resumed = uninterrupted", bounds=EXACT)]:
            row = sides.tried(case)
            if child.stopped_by:
                return stop.exit_code_for(child.stopped_by)
            rows.append(row)
            _say(str(row))
    holds = all(row.holds for row in rows)
    if holds:
        sides.remove()
    figures = {"command": shlex.join(sys.argv), "steps": STEPS, "holds": holds}
    write_json(run_dir / "proof.json", figures | {"cases": [asdict(row) for row in rows]})
    found = "every case holds" if holds else f"not every case holds, see {sides.log}"
    _say(f"{found}; the figures are in {run_dir / 'proof.json'}")
    return DONE if holds else FAILED


class _Sides:
    """Trained sides by their flags: each is trained once."""

    def __init__(
        self, place: Path, trained: Sequence[str], always: Sequence[object], child: Child
    ) -> None:
        self.place, self.log = place, place / "log.txt"
        self._trained, self._always, self._child = trained, always, child
        self._done: dict[tuple[str, ...], Path] = {}
        place.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")

    def tried(self, case: Case) -> Row:
        """What comes of a case."""
        row, is_exact = Row(case.name, bounds=case.bounds), case.bounds == EXACT
        if case.why_not:
            return replace(row, said=f"not tried: {case.why_not}")
        try:
            one = self._trained_with(case.one)
            other = self._interrupted(case.one) if is_exact else self._trained_with(case.other)
            row = self._compared(row, one, other)
            if is_exact and not row.holds:  # on a GPU two equal runs may differ
                noise = self._compared(row, one, self._run("repeated", case.one))
                known = max(noise.losses or 0.0, noise.weights or 0.0), noise.optimizer or 0.0
                bounds = (10 * known[0], 10 * known[1])
                row = self._compared(replace(row, bounds=bounds), one, other)
        except _FailedError as error:
            return replace(row, holds=False, said=f"FAILED: {error}")
        return row

    def remove(self) -> None:
        """Remove what the sides have written."""
        shutil.rmtree(self.place, ignore_errors=True)

    def _trained_with(self, flags: Sequence[object]) -> Path:
        """The directory of a side."""
        words = tuple(map(str, flags))
        if words not in self._done:
            self._done[words] = self._run(f"side_{len(self._done) + 1}", words)
        return self._done[words]

    def _interrupted(self, flags: Sequence[object]) -> Path:
        """The directory of a side that was interrupted, and continued by other processes."""
        here = self._run("resumed", [*flags, "--stop-after", INTERRUPTED_AT])
        return self._run("resumed", [*flags, "--resume", here], is_new=False)

    def _run(self, name: str, flags: Sequence[object], *, is_new: bool = True) -> Path:
        """Run the user's command with more flags; its directory. Raises _FailedError."""
        here = self.place / name
        if is_new:
            shutil.rmtree(here, ignore_errors=True)
        more = ["--run-dir", here, "--log-every", 1, "--resume", "never", "--stop-after", STEPS]
        added = (str(word).replace("{here}", str(here)) for word in [*self._always, *more, *flags])
        command = [sys.executable, *(word for word in sys.argv if word != "--prove"), *added]
        with self.log.open("a") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            code = self._child.run(
                command, {**os.environ, "TOOLKIT_NO_WORD": "1"}, output=log.fileno()
            )
        if code:
            last = read_text(self.log, errors="replace").split("\n")[-2]
            raise _FailedError(f"exit {code}, {last}")
        return here

    def _compared(self, row: Row, one: Path, other: Path) -> Row:
        """`row` with the errors of the side in `other` against that in `one`."""
        sides = [_state(here) for here in (one, other)]
        weights, optimizers = (
            [dict(pick(state["parts"])) for state in sides]
            for pick in (lambda parts: _weights(parts, self._trained), _moments)
        )
        errors = (_losses_error(one, other), _error(*weights), _error(*optimizers))
        row = replace(row, losses=errors[0], weights=errors[1], optimizer=errors[2])
        is_within = max(errors[:2]) <= row.bounds[0] and errors[2] <= row.bounds[1]
        said = "ok" if is_within else "OUT OF BOUNDS"
        if said == "ok" and row.bounds == EXACT and not _same_generators(*sides):
            said = "OUT OF BOUNDS: the random generators differ"
        return replace(row, holds=said == "ok", said=said)


class _FailedError(Exception):
    """A side that did not train; the message says why."""


def _say(text: str) -> None:
    sys.stdout.write(text.rstrip() + "\n")
    sys.stdout.flush()


# --- what two sides have trained ------------------------------------------------------------------


def _state(here: Path) -> dict[str, Any]:
    """The last checkpoint of a side."""
    from shared import checkpoint

    found = sorted(here.glob("last.pt*"))
    if not found:
        raise _FailedError(f"no checkpoint in {here}")
    return checkpoint.load(found[0])


def _losses_error(one: Path, other: Path) -> float:
    """The largest relative error of a step's loss; infinite when the steps are not the same."""
    sides = []
    for here in (one, other):
        rows = [row for row in read_json_lines(here / "metrics.jsonl") if row["split"] == "train"]
        sides.append({row["step"]: row.get(loss_tag(row)) for row in rows})
    if sides[0].keys() != sides[1].keys() or None in (*sides[0].values(), *sides[1].values()):
        return float("inf")
    pairs = [(loss, sides[1][step]) for step, loss in sides[0].items()]
    return max((abs(a - b) / max(abs(a), 1e-12) for a, b in pairs if a != b), default=0.0)


def _error(one: dict[str, list[Any]], other: dict[str, list[Any]]) -> float:
    """The largest |a - b| / |a| of two sides' tensors, norms taken over all of a kind."""
    if one.keys() != other.keys() or not one:
        return float("inf")
    errors = [0.0]
    for kind, tensors in one.items():
        pairs = list(zip(tensors, other[kind], strict=True))
        apart = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
        norm = sum(float(a.double().square().sum()) for a, _ in pairs)
        errors.append((apart / norm) ** 0.5 if norm else float("inf") if apart else 0.0)
    return max(errors)


def _weights(parts: dict[str, Any], trained: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """The tensors of each trained part."""
    for name in trained:
        yield name, [tensor for _, tensor in _tensors(parts[name])]


def _moments(parts: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """The tensors of all optimizers, by kind: moments of first order, of second order."""
    found: dict[str, list[Any]] = {}
    for part in parts.values():
        if isinstance(part, dict) and "param_groups" in part:
            for kind, tensor in _tensors(part["state"]):
                found.setdefault(kind, []).append(tensor)
    yield from found.items()


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The floating-point tensors in nested dictionaries, each with the last key above it."""
    import torch

    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(inner, str(key))
    elif isinstance(value, torch.Tensor) and value.is_floating_point():
        yield name, value


def _same_generators(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the ranks' random generators are in the same state."""
    import torch

    return all(
        torch.equal(a["torch"], b["torch"])
        and a["numpy"] == b["numpy"]
        and a["python"] == b["python"]
        for a, b in zip(one["generators"], other["generators"], strict=True)
    )
