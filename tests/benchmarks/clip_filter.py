"""How much faster pictures go through analysis, filter and view selection than one at a time.

    python tests/benchmarks/clip_filter.py [--vases 50] [--threads 2] [--repeats 1]

Both sides load the same ViT-B-32 (random weights, a folder of transformers) for each of the three
steps and score the same JPEG files. "one at a time" is the route of the scripts this recipe's
document describes: transformers' own model and Pillow's preparation, one picture a forward pass,
every step anew. "ours" are clipfilter1.py --analyze_only, clipfilter1.py and clipfilter2.py as they
are typed. Wall time, the sides in turn; the last line is JSON, with the largest difference of the
scores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn.functional import cosine_similarity

from tests.benchmarks.measure import compare, conclude
from vasevqa.demo_data.vases import VIEWS, make_vases, render, to_jpeg
from vasevqa.filter import clip, clipfilter1, clipfilter2

SIDE = 320  # pixels of a picture


def main() -> None:
    """Print a table of seconds, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vases", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pictures = write_pictures(root / "in", options.vases)
        weights = write_weights(root / "clip")
        figures: dict[str, list[float]] = {"one at a time": [], "ours": []}
        difference = 0.0
        for number in range(options.repeats):
            began = time.perf_counter()
            theirs = one_at_a_time(pictures, weights)
            middle = time.perf_counter()
            own = ours(root / "in", weights, root / f"run {number}")
            figures["one at a time"].append(middle - began)
            figures["ours"].append(time.perf_counter() - middle)
            difference = max(difference, largest_difference(own, theirs))
    found = compare(f"{len(pictures)} pictures, three steps", "s", figures, "one at a time")
    speed_up = round(1 / found["ours"]["ratio"], 2)
    print(f"\n{speed_up} times as fast; the scores differ by at most {difference:.1e}")
    conclude("clip_filter", "s", sides=found, speed_up=speed_up, score_difference=difference,
             pictures=len(pictures), threads=options.threads)  # fmt: skip


def write_pictures(root: Path, vases: int) -> list[Path]:
    """Four views of each vase, some vases broken."""
    root.mkdir()
    paths = []
    for vase in make_vases(vases, 7, broken=0.25):
        for view in VIEWS:
            paths.append(root / vase.file_name(view))
            paths[-1].write_bytes(to_jpeg(render(vase, view, size=SIDE)))
    return sorted(paths)


def write_weights(folder: Path) -> Path:
    """A ViT-B-32 with random weights, as transformers keeps it."""
    torch.manual_seed(0)
    transformers.CLIPModel(transformers.CLIPConfig()).save_pretrained(folder)
    transformers.CLIPImageProcessorPil().save_pretrained(folder)
    return folder


def one_at_a_time(paths: list[Path], weights: Path) -> dict[str, float]:
    """The scores of all pictures by the plain route, after its three passes."""
    sample = score_each(paths, weights)
    threshold = float(np.percentile(list(sample.values()), 25))
    scores = score_each(paths, weights)
    score_each([path for path in paths if scores[path.name] >= threshold], weights)
    return scores


def score_each(paths: list[Path], weights: Path) -> dict[str, float]:
    """Every picture's score, a forward pass for each."""
    from open_clip import SimpleTokenizer

    model = transformers.CLIPModel.from_pretrained(weights).eval()
    prepare = transformers.CLIPImageProcessorPil.from_pretrained(weights)
    texts = clip.read_prompts(clip.PROMPTS)
    found = {}
    with torch.no_grad():
        high, low = (
            model.get_text_features(SimpleTokenizer()(list(group))).pooler_output.mean(0)
            for group in (texts.high, texts.low)
        )
        for path in paths:
            with Image.open(path) as image:
                pixels = prepare(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
            own = model.get_image_features(pixel_values=pixels).pooler_output[0]
            score = cosine_similarity(own, high, dim=0) - cosine_similarity(own, low, dim=0)
            found[path.name] = float(score)
    return found


def ours(pictures: Path, weights: Path, out: Path) -> dict[str, float]:
    """The scores by the scripts, which write into `out`."""
    common = ["--model_cache_dir", weights, "--output_dir", out]
    filter_flags = ["--input_dir", pictures, *common]
    with contextlib.redirect_stdout(io.StringIO()):
        run(clipfilter1, [*filter_flags, "--analyze_only"])
        run(clipfilter1, filter_flags)
        run(clipfilter2, ["--input_dir", out / "accepted", *common])
    report = json.loads((out / "filtering_report.json").read_text())
    return {row["filename"]: row["quality_score"] for row in report["results"]}


def run(script: object, flags: list[object]) -> None:
    code = script.main(list(map(str, flags)))  # type: ignore[attr-defined]
    assert code == 0, (script, code)


def largest_difference(own: dict[str, float], theirs: dict[str, float]) -> float:
    assert own.keys() == theirs.keys()
    return max(abs(own[name] - theirs[name]) for name in own)


if __name__ == "__main__":
    main()
