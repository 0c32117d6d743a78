"""A training step and the input pipeline beside mmpretrain 1.2.0's, on equal terms.

    python tests/benchmarks/peer_mmpretrain.py [--site FOLDER] [--repeats 7] [--steps 2]

Both sides read mmpretrain's own resnet50-arcface_8xb32_inshop.py, begin with the same weights and
get the same uint8 pictures, each in the layout that its own loader hands on: mmpretrain's as BGR
planes, ours as interleaved RGB. A step is normalisation, forward and backward pass and SGD with
nesterov: mmpretrain's is its `train_step`, ours that of run_arcface.py with --amp off;
logging and hooks are left out on both sides. float32, one thread, CPU time.

That both compute the same is checked first, or the script ends with exit code 1: in float64 the
losses of three steps must agree within 1e-6, so forward pass, backward pass and update do; in
float32, before the first step, within 1e-3. Later steps in float32 say nothing: the gradients of an
untrained net are so large that rounding alone moves the second loss by 1e-2.

The pictures, for information: 256 x 256 JPEG files, resized to 512, cut to 448, mirrored by half;
"worker" up to what leaves a loader worker, "batch" on to the normalised float32 batch. Pillow's
side is that of inshop_loader.py.

Each side is a process of its own that takes its turns when asked, because mmpretrain comes with
packages of its own. They are installed by `python -m pip` into FOLDER, which may hold them from an
earlier run, or into a temporary one, never into this Python's environment: about 200 MB, without
torch. mmpretrain is no longer maintained, so what it needs beside it is listed below, and two
things differ from what its own metadata asks for: mmcv-lite is enough for ResNet and needs no
compiler, and model-index stands for modelindex, whose package is empty. Where that cannot be
installed or imported the script says why in one line, with exit code 3. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import numpy as np
import torch
from torch import Tensor
from torchvision.models import resnet50

from arcface.inshop_retrieval.config import read_config
from arcface.inshop_retrieval.encoders import Preprocess, build_encoder, fill_backbone
from arcface.inshop_retrieval.inshop import InShop
from arcface.inshop_retrieval.pipeline import build_pipeline
from arcface.inshop_retrieval.recipe import Overrides, Recipe, without_data
from arcface.inshop_retrieval.schedule import build_optimizers, parameters
from arcface.run_scripts.run_arcface import build_head
from shared.amp import Amp
from shared.device import keep_freed_memory
from shared.distributed import World
from shared.errors import MissingToolError, UserError, one_line
from tests.benchmarks.inshop_loader import BATCH, STEPS, batches, workers, write_pictures
from tests.benchmarks.measure import compare, conclude, in_turn

PEER = "mmpretrain"
PACKAGES = (
    *("mmpretrain==1.2.0", "mmengine==0.10.7", "mmcv-lite==2.1.0", "opencv-python-headless"),
    *("model-index", "ordered-set", "markdown", "tabulate", "click", "colorama", "mat4py"),
    *("importlib_metadata", "zipp", "einops", "addict", "yapf", "platformdirs", "termcolor"),
    *("rich", "markdown-it-py", "mdurl", "pygments"),
)
CONFIG = "mmpretrain/.mim/configs/arcface/resnet50-arcface_8xb32_inshop.py"
CASES = ((8, 128), (4, 224))  # pictures and their side
CLASSES, WIDTH = 3997, 2048
BASE_BATCH = 256  # that the configuration's learning rate is meant for
TOLERANCE = 1e-3  # of the first loss, about 40, in float32
CHECK = (4, 64)  # pictures and their side in float64
CHECK_STEPS, CHECK_TOLERANCE = 3, 1e-6
# in place of the configuration's, because dividing by them leaves no rounding to differ in
EXACT_MEAN, EXACT_STD = [128.0, 112.0, 96.0], [64.0, 32.0, 128.0]
GOAL = 0.9  # ours at most, as a part of mmpretrain's CPU time


class Side(Protocol):
    """What a process does when it is asked."""

    def begin(self, batch: int, size: int, exact: bool) -> None:
        """Build the model anew and load weights and pictures. exact: for the check in float64."""

    def step(self) -> float:
        """Train on the batch once; the loss before."""
        ...

    def open_pictures(self) -> dict[str, Callable[[], None]]:
        """Functions that read all pictures, by side and stage: "ours batch"."""
        ...


class Ours:
    def __init__(self, config: Path, folder: Path) -> None:
        keep_freed_memory()  # as run_arcface.py does on the CPU
        self._config, self._folder = config, folder

    def begin(self, batch: int, size: int, exact: bool) -> None:
        recipe = self._recipe(batch, exact)
        weights, images, self._labels = read_case(self._folder, batch, size)
        encoder = build_encoder(recipe.encoder, "random")
        fill_backbone(encoder.backbone, weights["backbone"], self._folder)
        self._dtype = torch.float64 if exact else torch.float32
        self._encoder = encoder.to(self._dtype, memory_format=torch.channels_last).train()
        head = build_head(recipe, torch.tensor(recipe.margins), World(), seed=0)
        self._head = head.to(self._dtype)
        self._head.weight.data.copy_(weights["centres"])
        lr = recipe.lr_for(batch)
        self._optimizer, _ = build_optimizers(recipe, encoder.backbone, self._head, lr)
        self._preprocess = Preprocess(recipe.mean, recipe.std)
        self._images = images.contiguous(memory_format=torch.channels_last)
        self._unflipped = torch.zeros(batch, dtype=torch.bool)
        self._amp = Amp("off", torch.device("cpu"))

    def _recipe(self, batch: int, exact: bool) -> Recipe:
        """What the configuration asks for, with the batch that decides the learning rate."""
        options = [f"train_dataloader.batch_size={batch}"]
        if exact:
            options.append(f"data_preprocessor.mean={EXACT_MEAN}")
            options.append(f"data_preprocessor.std={EXACT_STD}")
        over = Overrides(tuple(options))
        return without_data(read_config(self._config), over, self._folder).recipe

    def step(self) -> float:
        images = self._preprocess(self._images, self._unflipped).to(self._dtype)
        with self._amp.autocast():
            loss = self._head(self._encoder(images), self._labels)
        self._amp.backward(loss)
        self._amp.step(self._optimizer, parameters(self._optimizer))
        return float(loss.detach())

    def open_pictures(self) -> dict[str, Callable[[], None]]:
        data = InShop(self._folder, "train", build_pipeline(STEPS))
        paths = [self._folder / "Img" / name for name in data.names]
        stages = {"worker": workers(data, paths), "batch": batches(data, paths)}
        return {f"{name} {stage}": run for stage in stages for name, run in stages[stage].items()}


class Mmpretrain:
    def __init__(self, config: Path, folder: Path) -> None:
        if not hasattr(np, "in1d"):
            np.in1d = np.isin  # type: ignore[attr-defined] # its metrics use it, new numpy lacks it
        import cv2
        from mmengine.config import Config
        from mmpretrain.utils import register_all_modules

        self._settings, self._folder = Config.fromfile(config), folder
        cv2.setNumThreads(self._settings.env_cfg.mp_cfg.opencv_num_threads)
        register_all_modules()

    def begin(self, batch: int, size: int, exact: bool) -> None:
        from mmengine.optim import build_optim_wrapper
        from mmpretrain.registry import MODELS
        from mmpretrain.structures import DataSample

        settings = copy.deepcopy(self._settings)
        if exact:
            settings.data_preprocessor.update(mean=EXACT_MEAN, std=EXACT_STD)
        settings.model.image_encoder[0].init_cfg = None
        settings.model.data_preprocessor = settings.data_preprocessor
        settings.optim_wrapper.optimizer.lr *= batch / BASE_BATCH  # as auto_scale_lr does
        weights, images, labels = read_case(self._folder, batch, size)
        self._model = MODELS.build(settings.model)
        self._model.image_encoder[0].load_state_dict(weights["backbone"])
        self._model.head.norm_product.weight.data.copy_(weights["centres"])
        self._model.to(torch.float64 if exact else torch.float32).train()
        self._optimizer = build_optim_wrapper(self._model, settings.optim_wrapper)
        samples = [DataSample().set_gt_label(int(label)) for label in labels]
        planes = [image.flip(0).contiguous() for image in images]  # BGR, as OpenCV reads
        self._batch = {"inputs": planes, "data_samples": samples}

    def step(self) -> float:
        return float(self._model.train_step(self._batch, self._optimizer)["loss"].detach())

    def open_pictures(self) -> dict[str, Callable[[], None]]:
        from mmengine.dataset import pseudo_collate
        from mmpretrain.registry import DATASETS, MODELS

        settings = copy.deepcopy(self._settings)
        settings.train_dataloader.dataset.data_root = str(self._folder)
        data = DATASETS.build(settings.train_dataloader.dataset)
        kind = {"type": "ClsDataPreprocessor"}
        preprocess = MODELS.build(kind | settings.data_preprocessor.to_dict())
        groups = [range(i, min(i + BATCH, len(data))) for i in range(0, len(data), BATCH)]

        def worker() -> None:
            for index in range(len(data)):
                data[index]

        def batch() -> None:
            for group in groups:
                preprocess(pseudo_collate([data[index] for index in group]), True)

        return {f"{PEER} worker": worker, f"{PEER} batch": batch}


SIDES: dict[str, Callable[[Path, Path], Side]] = {PEER: Mmpretrain, "ours": Ours}


def write_case(folder: Path, batch: int, size: int) -> None:
    """Weights and a batch for both sides, drawn from a fixed seed."""
    torch.manual_seed(0)
    backbone = resnet50(weights=None)
    del backbone.fc
    numbers = torch.Generator().manual_seed(batch * size)
    case = {
        "backbone": backbone.state_dict(),
        "centres": torch.randn(CLASSES, WIDTH, generator=numbers) * (3 * WIDTH) ** -0.5,
        "images": torch.randint(256, (batch, 3, size, size), generator=numbers).byte(),
        "labels": torch.randint(CLASSES, (batch,), generator=numbers),
    }
    torch.save(case, folder / f"{batch}x{size}.pt")


def read_case(folder: Path, batch: int, size: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The weights, the pictures (B, 3, S, S) as RGB planes, and their labels."""
    case = torch.load(folder / f"{batch}x{size}.pt", weights_only=True)
    return case, case["images"], case["labels"]


def serve(side: Side, answers: TextIO) -> None:
    """Do what each line of standard input asks for and answer with a line of JSON."""
    pictures: dict[str, Callable[[], None]] = {}

    def steps(count: int) -> dict[str, Any]:
        begun = time.process_time()
        losses = [side.step() for _ in range(count)]
        return {"seconds": (time.process_time() - begun) / count, "losses": losses}

    def read(which: str) -> float:
        if not pictures:
            pictures.update(side.open_pictures())
        begun = time.process_time()
        pictures[which]()
        return time.process_time() - begun

    tasks: dict[str, Callable[..., Any]] = {"begin": side.begin, "steps": steps, "read": read}
    answers.write(f"{json.dumps(versions())}\n")
    for line in sys.stdin:
        name, *words = json.loads(line)
        answers.write(f"{json.dumps(tasks[name](*words))}\n")


def versions() -> dict[str, str]:
    """Of what decides the figures, where this process has it."""
    found = {}
    peer = ("mmpretrain", "mmengine", "mmcv-lite", "opencv-python-headless")
    for name in ("torch", "torchvision", "numpy", "pillow", *peer):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


class Child:
    """The process of one side."""

    def __init__(self, name: str, site: Path, folder: Path) -> None:
        self.name, self._log = name, folder / f"{name}.log"
        command = [sys.executable, __file__, "--side", name, "--site", site, "--folder", folder]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def answer(self) -> Any:
        """The next answer. Raises RuntimeError, with its last line, when the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"{self.name} ended with exit code {code}: {' '.join(last)}")

    def ask(self, *task: Any) -> Any:
        """Have the process do a task; its answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # answer() says what ended the process
            self._process.stdin.write(f"{json.dumps(task)}\n")
            self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def install(site: Path) -> None:
    """Put mmpretrain and what it needs into `site`, unless they are there.

    Raises MissingToolError where that fails, and UserError for a folder that holds other things.
    """
    if (site / CONFIG).is_file():
        return
    if site.resolve().is_relative_to(Path(sys.prefix).resolve()):
        raise UserError(f"--site {site} lies in this Python's environment: name another folder")
    if site.exists() and not (site.is_dir() and not any(site.iterdir())):
        raise UserError(f"--site {site} is not an empty folder, nor from an earlier run")
    print(f"installing {len(PACKAGES)} packages into {site}", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--target", str(site), "--no-deps"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "--retries", "1"]
    done = subprocess.run([*command, *PACKAGES], capture_output=True, text=True, check=False)
    if done.returncode or not (site / CONFIG).is_file():
        lines = done.stderr.strip().splitlines()
        reasons = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        raise MissingToolError(
            f"mmpretrain cannot be installed into {site} (pip's exit code {done.returncode}: "
            f"{' '.join(reasons)}); this comparison needs pip and the network"
        )


def start(name: str, site: Path, folder: Path) -> tuple[Child, dict[str, str]]:
    """A side's process, ready, and the versions that it runs."""
    child = Child(name, site, folder)
    try:
        return child, child.answer()
    except RuntimeError as error:
        child.close()
        if name != PEER:
            raise
        raise MissingToolError(
            f"mmpretrain is installed in {site} but cannot be imported: {one_line(error)}"
        ) from None


def check(sides: dict[str, Child], folder: Path) -> float:
    """The largest difference of the losses in float64. Raises RuntimeError for a real one."""
    write_case(folder, *CHECK)
    for child in sides.values():
        child.ask("begin", *CHECK, True)
    losses = {name: child.ask("steps", CHECK_STEPS)["losses"] for name, child in sides.items()}
    difference = refuse_difference(losses, CHECK_TOLERANCE)
    print(f"float64, {CHECK_STEPS} steps: losses differ by at most {difference:.1e}", flush=True)
    return difference


def refuse_difference(losses: dict[str, list[float]], tolerance: float) -> float:
    """The largest difference. Raises RuntimeError where it is above `tolerance`, or no number."""
    gaps = [abs(a - b) for a, b in zip(losses[PEER], losses["ours"], strict=True)]
    if not all(gap <= tolerance for gap in gaps):
        raise RuntimeError(f"the sides do not compute the same: {losses}, allowed is {tolerance}")
    return max(gaps)


def compare_steps(sides: dict[str, Child], args: argparse.Namespace) -> dict[str, Any]:
    """A table for each case, and how far the first losses are apart."""
    found = {}
    for batch, size in CASES[: args.cases]:
        write_case(args.folder, batch, size)
        for child in sides.values():
            child.ask("begin", batch, size, False)
        first = {name: child.ask("steps", 1)["losses"] for name, child in sides.items()}
        difference = refuse_difference(first, TOLERANCE)

        def turn(child: Child) -> float:
            return child.ask("steps", args.steps)["seconds"]

        turns = {name: partial(turn, child) for name, child in sides.items()}
        title = f"a step of ResNet-50 and {CLASSES} centres, batch {batch} at {size} px"
        rows = compare(title, "CPU s", in_turn(turns, args.repeats), PEER)
        print(f"  the first loss, {first['ours'][0]:.4f}, differs by {difference:.1e}", flush=True)
        found[f"{batch}x{size}"] = {"seconds": rows, "first_loss_difference": difference}
    return found


def compare_pictures(sides: dict[str, Child], args: argparse.Namespace) -> dict[str, Any]:
    """A table for each stage of the input pipeline."""
    write_pictures(args.folder, args.images)
    found = {}
    for stage in ("worker", "batch"):

        def turn(child: Child, which: str) -> float:
            return child.ask("read", which) / args.images * 1e3

        whose = {PEER: sides[PEER], "ours": sides["ours"], "Pillow": sides["ours"]}
        turns = {name: partial(turn, child, f"{name} {stage}") for name, child in whose.items()}
        figures = in_turn(turns, args.repeats)
        found[stage] = compare(f"256 to 512 to 448, {stage}", "CPU ms a picture", figures, PEER)
        pairs = zip(figures["Pillow"], figures["ours"], strict=True)
        speed_up = statistics.median(pillow / own for pillow, own in pairs)
        print(f"  ours: {speed_up:.2f} times Pillow's speed", flush=True)
        found[stage]["ours"]["times_pillow"] = round(speed_up, 2)
    return found


@contextmanager
def running(site: Path, folder: Path) -> Iterator[tuple[dict[str, Child], dict[str, str]]]:
    """The processes of all sides, and the versions that they run."""
    children, found = {}, {}
    try:
        for name in SIDES:
            children[name], own = start(name, site, folder)
            found |= own
        yield children, found
    finally:
        for child in children.values():
            child.close()


def measure(args: argparse.Namespace) -> None:
    install(args.site)
    megabytes = sum(p.stat().st_size for p in args.site.rglob("*") if p.is_file()) / 1e6
    print(f"{PEER} and what it needs: {megabytes:.0f} MB", flush=True)
    with running(args.site, args.folder) as (sides, found):
        exact = check(sides, args.folder)
        steps = compare_steps(sides, args)
        pictures = compare_pictures(sides, args)
    ratios = {case: rows["seconds"]["ours"]["ratio"] for case, rows in steps.items()}
    print(f"\nours as a part of {PEER}'s step: {ratios}, the goal is at most {GOAL}")
    conclude(
        "peer_mmpretrain", "CPU s, CPU ms a picture", steps=steps, pictures=pictures,
        float64_difference=exact, versions=found, installed_mb=round(megabytes),
    )  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", type=Path, help="folder for mmpretrain; default: temporary")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="of one turn")
    parser.add_argument("--cases", type=int, default=len(CASES), choices=range(1, len(CASES) + 1))
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def work(args: argparse.Namespace) -> None:
    """Be one side's process."""
    torch.set_num_threads(1)
    if args.side == PEER:
        # Before this environment's packages, but behind our own imports: it has a package `tests`.
        sys.path.insert(0, str(args.site))
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        serve(SIDES[args.side](args.site / CONFIG, args.folder), answers)


def main() -> int:
    args = parse()
    if args.side:
        work(args)
        return 0
    with tempfile.TemporaryDirectory() as name:
        args.folder = Path(name)
        args.site = args.site.expanduser() if args.site else args.folder / "site"
        try:
            measure(args)
        except UserError as error:
            print(one_line(error), file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
