"""Which part of face_distill's loss helps on the demo: the table of its README.

    python tests/full/face_ablation.py            5 settings x 3 seeds, about 10 minutes
    python tests/full/face_ablation.py --seeds 0 --picture face_distill/roc.svg
    python tests/full/face_ablation.py --faces 1     the same on faces that another seed draws

Every setting trains on the same pictures, with the same steps and learning rate. The figure is the
ten-fold accuracy on 600 drawn pairs of people who are in no training set. --picture draws the ROC
of the first seed's students.
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
DRAWN = ("ArcFace alone", "ArcFace + AT + RKD (the demo)")


def train(name: str, seed: int, root: Path, places: list[str]) -> Path:
    """The run directory of a run of the demo; places: flags that name other faces."""
    typed = zip(("--lambda-at", "--lambda-rkd"), SETTINGS[name], strict=True)
    flags = [str(word) for flag, value in typed if value is not None for word in (flag, value)]
    run_dir = root / f"{name} {seed}" / "checkpoints"
    command = [sys.executable, str(SCRIPT), "--demo", "--seed", str(seed), *flags, *places]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["--run-dir", str(run_dir)]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return run_dir


def drawn(root: Path, seed: int) -> list[str]:
    """Flags that name the demo's data as `seed` draws them, below `root`."""
    sys.path.insert(0, str(ROOT))
    from face_distill.demo_data import demo

    paths = demo.build(root, seed)
    return [
        *("--data-root", str(paths.data_root), "--teacher-feat-dir", str(paths.teacher)),
        *("--blip-path", str(paths.weights), "--verify", str(paths.pairs)),
    ]


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--faces", type=int, default=0, help="seed that draws the faces")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args(argv)
    print(f"| setting | {' | '.join(f'seed {seed}' for seed in args.seeds)} | mean |")
    print("|---" * (len(args.seeds) + 2) + "|")
    results: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        places = drawn(root / "faces", args.faces) if args.faces else []
        for name in SETTINGS:
            runs = [train(name, seed, root, places) for seed in args.seeds]
            results = [json.loads((r / "status.json").read_text())["result"] for r in runs]
            print(row(name, [result["after"] for result in results]), flush=True)
        print(row("untrained", [result["before"] for result in results]))
        if args.picture:
            draw(args.picture, {n: root / f"{n} {args.seeds[0]}" / "checkpoints" for n in DRAWN})
    return 0


def draw(path: Path, runs: dict[str, Path]) -> None:
    """The ROC of the untrained student and of these runs' best, on the demo's pairs."""
    sys.path.insert(0, str(ROOT))
    import torch

    from face_distill import evaluate
    from face_distill.demo_data.demo import DemoPaths
    from face_distill.distill import model, pairs, verification
    from shared.page import write_chart

    paths = DemoPaths(ROOT / "face_distill" / "demo")
    found = pairs.read_set(paths.pairs).pairs
    lines = {}
    for name, run_dir in {"untrained": None, **runs}.items():
        best = run_dir and run_dir / "best_student_adapter_face.pth"
        embed = model.FaceEmbedder(model.open_student(paths.weights, best), torch.device("cpu"))
        rows = verification.flip_embeddings(embed, found.images).numpy()
        figures = verification.judge(verification.pair_distances(rows), found.same)
        lines |= evaluate._roc_lines({name: figures})
    title = "600 drawn pairs of people who are in no training set"
    write_chart(path, lines, title=title, **evaluate.ROC_AXES)


def row(name: str, values: list[float]) -> str:
    """A line of the table."""
    cells = [f"{value:.3f}" for value in [*values, statistics.mean(values)]]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
