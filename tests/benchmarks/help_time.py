"""How long `--help` of every entry script takes, beside an empty Python and one that imports torch.

python tests/benchmarks/help_time.py --repeats 5
"""

import argparse
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from tests.benchmarks.measure import ROOT, compare, conclude, in_turn

HEAVY = {"torch", "numpy", "torchvision", "transformers", "peft", "accelerate", "yaml", "PIL"}
ENTRY = re.compile(r"^    sys\.exit\(launch\(main\)\)|^    sys\.exit\(launch\(main,", re.MULTILINE)


def entry_scripts() -> list[Path]:
    """Every script of the repository that ends in `sys.exit(launch(main))`."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."]
    found = [
        file for folder in folders for file in folder.rglob("*.py") if "venv" not in file.parts
    ]
    return sorted(file for file in found if ENTRY.search(file.read_text(encoding="utf-8")))


class Timed:
    """`python ARGUMENTS` from start to exit, in milliseconds; beside it those of the processor."""

    def __init__(self, *arguments: str) -> None:
        self._command = [sys.executable, *arguments]
        self.of_processor: list[float] = []

    def __call__(self) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begun = time.perf_counter()
        subprocess.run(self._command, check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - begun
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.of_processor.append(used * 1e3)
        return wall * 1e3


def heavy_imports(script: Path) -> list[str]:
    """The slow packages that `--help` of `script` imports."""
    command = [sys.executable, "-X", "importtime", str(script), "--help"]
    trace = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sorted(HEAVY & set(re.findall(r"\|\s+(\w+)\s*$", trace, re.MULTILINE)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    scripts = entry_scripts()
    sides = {"python -c pass": Timed("-c", "pass")}
    sides |= {str(path.relative_to(ROOT)): Timed(str(path), "--help") for path in scripts}
    sides["python -c 'import torch'"] = Timed("-c", "import torch")
    wall = in_turn(sides, args.repeats)
    used = {name: side.of_processor[1:] for name, side in sides.items()}  # as in_turn counts
    found = {
        "wall": compare("--help, by the clock", "ms", wall, "python -c pass"),
        "cpu": compare("--help, of the processor", "ms", used, "python -c pass"),
    }
    heavy = {str(path.relative_to(ROOT)): heavy_imports(path) for path in scripts}
    for name, packages in heavy.items():
        print(f"  {name} imports {', '.join(packages) or 'nothing heavy'}")
    conclude("help_time", "ms", **found, heavy_imports=heavy)
    return 0


if __name__ == "__main__":
    sys.exit(main())
