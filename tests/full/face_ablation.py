"""Which part of face_distill's loss helps on the demo: the table of its README.

    python tests/full/face_ablation.py            5 settings x 3 seeds, about 10 minutes
    python tests/full/face_ablation.py --seeds 0

Every setting trains on the same pictures, with the same steps and learning rate. The figure is the
ten-fold accuracy on 600 drawn pairs of people who are in no training set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "face_distill" / "train_distill.py"
SETTINGS = {  # name: LAMBDA_AT and LAMBDA_RKD, None: the demo's
    "ArcFace alone": (0, 0),
    "ArcFace + AT": (None, 0),
    "ArcFace + RKD": (0, None),
    "ArcFace + AT + RKD (the demo)": (None, None),
    "the documented weights": (1000, 1),
}


def accuracies(weights: tuple[float | None, float | None], seed: int) -> tuple[float, float]:
    """The accuracy before and after a run of the demo."""
    typed = zip(("--lambda-at", "--lambda-rkd"), weights, strict=True)
    flags = [str(word) for flag, value in typed if value is not None for word in (flag, value)]
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "checkpoints"
        command = [sys.executable, str(SCRIPT), "--demo", "--seed", str(seed), *flags]
        subprocess.run(
            [*command, "--run-dir", str(run_dir)], check=True, capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        result = json.loads((run_dir / "status.json").read_text())["result"]
    return result["before"], result["after"]


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args(argv).seeds
    print(f"| setting | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |")
    print("|---" * (len(seeds) + 2) + "|")
    untrained: list[float] = []
    for name, weights in SETTINGS.items():
        found = [accuracies(weights, seed) for seed in seeds]
        untrained = [before for before, _ in found]
        print(row(name, [after for _, after in found]), flush=True)
    print(row("untrained", untrained))
    return 0


def row(name: str, values: list[float]) -> str:
    """A line of the table."""
    cells = [f"{value:.3f}" for value in [*values, statistics.mean(values)]]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
