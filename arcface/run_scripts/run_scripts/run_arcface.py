"""run_arcface.py, where `cd …/run_scripts` and `python run_scripts/run_arcface.py` look for it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # repository root, for shared


def start() -> int:
    """The same program; its exit code."""
    from arcface.run_scripts import run_arcface

    return run_arcface.start()


if __name__ == "__main__":
    sys.exit(start())
