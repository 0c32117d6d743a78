"""The smallest recipe on `shared`: a two-layer net on seeded points; what the faults are tried on.

python tests/faults/probe_recipe.py --epochs 3 --nproc 2 --workers 2
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared import outcome
from shared.config import RunOptions, option, parse
from shared.launch import launch

RUN_DIR = Path(__file__).resolve().parent / "demo" / "runs" / "probe"


@dataclass(frozen=True)
class Config:
    """Settings of the probe."""

    epochs: int = option(3, "passes over the points", scope="length")
    batch_size: int = option(8, "points a process and step")
    num_points: int = option(128, "points in the set")
    width: int = option(16, "hidden units: the size of a checkpoint")
    dropout: float = option(0.1, "share of hidden units left out")
    augment: bool = option(True, "move the points at random")
    patience: int = option(0, "epochs without a lower loss before stopping; 0: never")
    workers: int = option(0, "loader workers a process", scope="free")
    fault: str = option(
        "", "what goes wrong: name@step[@rank],… (see probe_training.py)", scope="free"
    )
    step_ms: float = option(0.0, "milliseconds to sleep a step", scope="free")
    judge_batches: int = option(0, "batches of an evaluation at the end", scope="free")
    run: RunOptions = field(default_factory=lambda: RunOptions(log_every=1, save_every=5))


def main(argv: list[str] | None = None) -> int:
    """Train; the exit code."""
    cfg = parse(Config, argv, __doc__)
    if cfg.run.dry_run:
        return 0
    if cfg.run.prove:
        from shared.prove import Case, prove

        one, two = ["--nproc", 1, "--batch-size", 16], ["--nproc", 2, "--batch-size", 8]
        case = Case("one = 2 processes", [*one, "--dropout", 0], [*two, "--dropout", 0])
        return prove(cfg.run, cfg.run.run_dir or RUN_DIR, ("model",), [case])
    from tests.faults.probe_training import train

    return train(cfg, cfg.run.run_dir or RUN_DIR)


def hurry() -> None:
    """Take no time for torch's compiler, which optimizers import unused, and for report.html."""
    from unittest import mock

    sys.modules["torch._dynamo"] = mock.MagicMock(disable=lambda function, *_, **__: function)
    outcome.leave_page = lambda run_dir: None


if __name__ == "__main__":
    if os.environ.get("PROBE_HURRIES"):  # tests/harness.py
        hurry()
    sys.exit(launch(main))
