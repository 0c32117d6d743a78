"""Does multimodal learn from all kinds of pairs? The tables of its README, on its demo's data.

    python tests/full/multimodal_kinds.py              3 settings x 3 seeds, about 20 minutes
    python tests/full/multimodal_kinds.py --seeds 0

Figures are R@1 of the test splits, the mean of both directions, in percent: the mean of the seeds
and their range. The last two settings take every set once an epoch (--balance 1), so that both
make the same steps on sounds and on voices.
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
SCRIPT = ROOT / "multimodal" / "run_training.py"
SETTINGS = {
    "the demo": [],
    "all kinds, each once an epoch": ["--balance", "1"],
    "without pictures and texts": [
        *("--balance", "1", "--datasets", "clotho", "audiocaps", "voxceleb"),
    ],
}
SETS = ("coco", "clotho", "audiocaps", "voxceleb")


def train(flags: list[str], seed: int, root: Path) -> dict[str, dict[str, float]]:
    """The rows of the report's result by data set, of a run of the demo."""
    output = root / f"{seed} {' '.join(flags)}"
    command = [sys.executable, str(SCRIPT), "--demo", "--seed", str(seed), *flags]
    command += ["--output-dir", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    (report,) = (output / "reports").glob("report_*.json")
    return {row["pairs"]: row for row in json.loads(report.read_text())["summary"]}


def cell(values: list[float]) -> str:
    """Mean and range in percent; '–' for no values."""
    if not values:
        return "–"
    shown = [100 * value for value in values]
    return f"{statistics.mean(shown):.0f} % ({min(shown):.0f} to {max(shown):.0f})"


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    print(f"| setting | {' | '.join(SETS)} |\n{'|---' * (len(SETS) + 1)}|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for name, flags in SETTINGS.items():
            runs = [train(flags, seed, Path(directory)) for seed in args.seeds]
            found = [[run[one]["R@1 after"] for run in runs if one in run] for one in SETS]
            print(f"| {name} | {' | '.join(map(cell, found))} |", flush=True)
            for run in runs:
                print(f"  {run}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
