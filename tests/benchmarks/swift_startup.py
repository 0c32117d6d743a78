"""How long vasevqa's scripts take before swift begins, beside bash and an empty Python.

python tests/benchmarks/swift_startup.py --repeats 5 --rows 2000

A recording stand-in is in swift's place: measured is all that comes before its first line, with
rows and pictures checked (every picture known from before, and 64 of them decoded again).
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from tests.benchmarks.measure import ROOT, compare, conclude, in_turn

SCRIPT = ROOT / "vasevqa" / "model" / "sft.sh"
STAND_IN = (
    "import os, pathlib, time\npathlib.Path(os.environ['RECORD']).write_text(str(time.time()))\n"
)


class Started:
    """Seconds from typing a command until swift's first line, in milliseconds."""

    def __init__(self, work: Path, *flags: str) -> None:
        self._record = work / "began"
        self._command = [str(SCRIPT), *flags]
        self._env = os.environ | {
            **{"PYTHON": sys.executable, "PYTHONPATH": str(work / "fake")},
            **{"RECORD": str(self._record), "CUDA_VISIBLE_DEVICES": ""},
        }

    def __call__(self) -> float:
        self._record.unlink(missing_ok=True)
        begun = time.time()
        subprocess.run(self._command, env=self._env, check=True, stdout=subprocess.DEVNULL)
        return (float(self._record.read_text()) - begun) * 1e3


class Whole:
    """A command from start to end, in milliseconds."""

    def __init__(self, *command: str) -> None:
        self._command = command

    def __call__(self) -> float:
        begun = time.perf_counter()
        subprocess.run(self._command, check=True)
        return (time.perf_counter() - begun) * 1e3


def prepare(work: Path, rows: int) -> list[str]:
    """A stand-in for swift, a model, `rows` rows with a picture each; the flags for them."""
    from PIL import Image

    spec = importlib.util.find_spec("swift")
    assert spec and spec.origin
    fake = work / "fake" / "swift"
    (fake / "cli").mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "cli" / "sft.py").write_text(STAND_IN)
    for name in ("arguments", "trainers", "rlhf_trainers"):
        (fake / name).symlink_to(Path(spec.origin).parent / name)
    model, pictures = work / "model", work / "pictures"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    (model / "pytorch_model.bin").touch()
    pictures.mkdir()
    Image.effect_noise((640, 480), 50).convert("RGB").save(pictures / "0.jpg")
    content = (pictures / "0.jpg").read_bytes()
    data = []
    for number in range(rows):
        (pictures / f"{number}.jpg").write_bytes(content)
        turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "krater"}]
        data.append({"images": [f"pictures/{number}.jpg"], "conversations": turns})
    (work / "rows.json").write_text(json.dumps(data))
    flags = ["--model", str(model), "--dataset", str(work / "rows.json"), "--resume", "never"]
    return [*flags, "--output_dir", str(work / "out" / "7B")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        flags = prepare(work, args.rows)
        Started(work, *flags)()  # decodes every picture, once
        sides = {
            "python -c pass": Whole(sys.executable, "-c", "pass"),
            f"./sft.sh, {args.rows} rows": Started(work, *flags),
            f"./sft.sh, {args.rows} rows, no full check": Started(work, *flags, "--no-image-check"),
        }
        found = compare("until swift begins", "ms", in_turn(sides, args.repeats), "python -c pass")
    conclude("swift_startup", "ms", wall=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
