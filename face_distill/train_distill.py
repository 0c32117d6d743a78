"""Distil a face teacher into adapters on BLIP-2's frozen vision tower.

python train_distill.py                          every visible GPU, one process each
python train_distill.py --batch-size 64          half the images a step
torchrun --nproc_per_node=4 train_distill.py     the same on four GPUs, said explicitly
python train_distill.py --demo                   built-in data, on any machine
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared
if not Path(sys.path[0], "shared").is_dir():  # the directory was copied alone
    sys.stderr.write("error: shared/ is missing beside face_distill/: copy the whole repository\n")
    sys.exit(3)

from shared import replay, stop

if __name__ == "__main__":
    stop.listen()

from shared.config import RunOptions, free, option, parse
from shared.errors import UserError
from shared.files import open_lock, read_object, write_json
from shared.launch import launch, world_size
from shared.settings import (
    COUNTS,
    Count,
    Positive,
    Range,
    ShareBelowOne,
    Workers,
    number,
)

if TYPE_CHECKING:  # torch comes after the input is checked
    from torch import Tensor

    from face_distill.distill.losses import Balance, Distillation
    from face_distill.distill.model import FaceStudent
    from face_distill.distill.teacher import TeacherFeatures
    from face_distill.FaceDataset import FaceDataset
    from shared.amp import EarlyStopping, Mean
    from shared.distributed import World
    from shared.run import Run

log = logging.getLogger(__name__)

# --- configuration: edit here, or type the flag of the same name ----------------------------------
PROJECT_ROOT = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120, as documented

BLIP_PATH = os.path.join(PROJECT_ROOT, "blip2_weights")  # noqa: PTH118
DATA_ROOT = os.path.join(PROJECT_ROOT, "datasets", "faces_emore")  # noqa: PTH118
TEACHER_FEAT_DIR = os.path.join(PROJECT_ROOT, "teacher_features_12k")  # noqa: PTH118

BATCH_SIZE = 128
EPOCHS = 100
LR = 5e-4
LAMBDA_AT = 1000.0
LAMBDA_RKD = 1.0
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of the distillation."""

    blip_path: Path = free(Path(BLIP_PATH), "BLIP-2 checkpoint directory")
    data_root: Path = free(Path(DATA_ROOT), "faces_emore, or <identity>/<image>")
    teacher_feat_dir: Path = free(
        Path(TEACHER_FEAT_DIR), "teacher_embedding.npy and teacher_feat_map.npy"
    )
    batch_size: Count = option(BATCH_SIZE, "images a step, summed over all processes")
    epochs: Count = option(EPOCHS, "passes over the images", scope="length")
    lr: Positive = option(LR, "learning rate, cosine to 0 over the epochs")
    weight_decay: float = option(1e-4, "AdamW's weight decay")
    lambda_arc: float = option(1.0, "weight of the ArcFace loss")
    lambda_at: float = option(LAMBDA_AT, "weight of the attention transfer")
    lambda_rkd: float = option(LAMBDA_RKD, "weight of the relational distillation")
    rkd_angle_weight: float = option(0.0, "weight of RKD's angles beside its distances")
    rkd_norm: Literal["offdiag", "all"] = option("offdiag", "pairs in the mean distance of RKD")
    at_mode: Literal["auto", "kl_energy", "zagoruyko", "kl_minmax"] = option(
        "auto", "attention transfer; auto: kl_energy for probability maps, zagoruyko for features"
    )
    arc_margin: Annotated[float, Range(0, 1.57)] = option(0.5, "ArcFace's angular margin, radians")
    arc_scale: Positive = option(64.0, "ArcFace's scale")
    num_classes: str = option("auto", "identities of the ArcFace head; auto: those selected")
    warmup_epochs: int = option(1, "first epochs with ArcFace alone")
    patience: Count = option(5, "epochs without a lower loss before the run stops")
    val_fraction: ShareBelowOne = option(
        0.0, "share of the images held out for the validation loss"
    )
    selection: Literal["first_n", "per_id"] = option("first_n", "which images: see README")
    per_id: Count = option(20, "images of each identity with --selection per_id")
    adapter_layers: str = option("spread:12", "layers with adapters: spread:N or last:N")
    image_size: Annotated[int, Range(32, 4096)] | None = option(
        None, "side of the tower's input; default: the tower's own"
    )
    clip_norm: Positive | None = option(None, "largest norm of the gradients; default: any")
    gradient_checkpointing: bool = free(False, "less memory for more time")
    micro_batch: Count | None = free(
        None, "images a process computes at a time: less memory, the same gradients"
    )
    full_checkpoint: bool = free(False, "save the whole student, tower included")
    cache: bool = free(True, "decode every image once, into shared memory")
    workers: Workers = free(4, "loader workers a process")
    verify: Path | None = free(None, "pairs (lfw.bin …) to verify before and after")
    log_dir: Path | None = free(None, "TensorBoard; default logs/adapter_face_distill")
    estimate: bool = free(False, "print how much memory a process needs, stop")
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        """Refuse what no run can use."""
        if self.num_classes != "auto":
            number("num_classes (auto or a number)", self.num_classes, int, COUNTS)

    @property
    def largest_norm(self) -> float:
        """To which the gradients are shortened."""
        return self.clip_norm or math.inf

    @property
    def run_dir(self) -> Path:
        """Where checkpoints, status and metrics go."""
        return self.run.run_dir or Path(PROJECT_ROOT) / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Where TensorBoard's events go: as documented, or beside a run directory of the user's."""
        beside = self.run_dir.parent if self.run.run_dir else Path(PROJECT_ROOT)
        return self.log_dir or beside / "logs" / "adapter_face_distill"


DEMO = {  # what suits 400 pictures and a tower of 0.3 million parameters; typed flags win
    "batch_size": 32,
    "epochs": 60,
    "lr": 5e-3,  # adapters of some hundred parameters learn little from 5e-4
    # Gradients on the adapters in the first hundred steps: RKD with 100 pulls one to ten times as
    # strongly as ArcFace (with the documented 1 it would hardly count), AT with 0.01 some
    # hundredths (with 1000 more than a thousand times: ArcFace learns nothing, see README).
    "lambda_at": 0.01,
    "lambda_rkd": 100.0,
    "arc_scale": 16.0,  # 64 and 0.5 are for embeddings of 512 and more dimensions, not of 64
    "arc_margin": 0.2,
    "adapter_layers": "spread:4",
    "workers": 0,
}


def main(argv: list[str] | None = None) -> int:
    """Check the input, then train; the exit code."""
    cfg = parse(Config, argv, __doc__, DEMO)
    if cfg.run.demo:
        cfg = _with_demo(cfg)
    if cfg.run.replay:
        cfg = replace(cfg, run=replay.settle(cfg, cfg.run_dir))
    _check_batch_size(cfg.batch_size, world_size())
    if cfg.estimate:
        from face_distill import memory

        print(memory.text(memory.fitted(cfg, world_size()), world_size()))
        return 0
    _check_files(cfg)
    if cfg.run.fit:
        from face_distill import memory

        cfg = memory.fitted(cfg, world_size())
    if cfg.run.dry_run:
        print(_plan(cfg))
        return 0
    if cfg.run.prove:
        return _prove(cfg)
    os.close(open_lock(cfg.run_dir))  # better refused now than after the tower was loaded
    from face_distill import memory
    from shared.memory import explained_out_of_memory

    with explained_out_of_memory(lambda: memory.text(cfg, world_size())):
        return train(cfg)


def train(cfg: Config) -> int:
    """The whole training; the exit code."""
    import torch

    from face_distill.distill import losses, model, student_files
    from face_distill.distill.images import Preprocess
    from face_distill.distill.teacher import TeacherFeatures
    from face_distill.FaceDataset import FaceDataset, split
    from shared import distributed, seed
    from shared.amp import Amp, EarlyStopping, Mean
    from shared.loader import make_eval_loader, steps_per_epoch
    from shared.reporter import Plan
    from shared.run import Run

    world = distributed.setup(cfg.run.device, cfg.run.timeout)
    per_process = cfg.batch_size // world.size
    with Run(cfg, world, cfg.run_dir, "face_distill", last="last.pth",
             tensorboard=cfg.tensorboard) as run:  # fmt: skip
        # data: pictures, and what the teacher says of each
        seed.seed_all(cfg.run.seed)
        teacher = TeacherFeatures(cfg.teacher_feat_dir)
        faces = FaceDataset(cfg.data_root, cfg.selection, len(teacher), cfg.per_id, cfg.cache)
        teacher.check_alignment(faces)
        train_set, val_set = split(faces, cfg.val_fraction, cfg.run.seed, 2 * world.size)
        steps = steps_per_epoch(len(train_set), per_process, world.size)

        # the student: a frozen tower with adapters, and the ArcFace head
        student = model.build_student(
            model.load_tower(cfg.blip_path), cfg.adapter_layers, _num_classes(cfg, faces),
            scale=cfg.arc_scale, margin=cfg.arc_margin, image_size=cfg.image_size,
            micro_batch=cfg.micro_batch, checkpointing=cfg.gradient_checkpointing,
        ).to(world.device)  # fmt: skip
        net = distributed.wrap(student, world)
        preprocess = Preprocess(student.image_size).to(world.device)
        weights = {"ArcFace": cfg.lambda_arc, "AT": cfg.lambda_at, "RKD": cfg.lambda_rkd}
        criterion = losses.Distillation(weights, losses.at_mode_for(cfg.at_mode, teacher.kind),
                                        cfg.rkd_norm, cfg.rkd_angle_weight)  # fmt: skip

        trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=cfg.lr, weight_decay=cfg.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=cfg.epochs)
        amp = Amp(cfg.run.amp, world.device, max_bad_steps=cfg.run.max_bad_steps)
        stopping, mean_loss = EarlyStopping(cfg.patience), Mean(world)
        balance = losses.Balance(weights, model.adapters(student), cfg.epochs * steps)
        parts = {"optimizer": optimizer, "schedule": schedule, "amp": amp, "stopping": stopping,
                 "student": model.Trainable(student), "mean_loss": mean_loss}  # fmt: skip
        counts = {"training images": len(train_set), "identities": faces.num_classes,
                  "held-out images": len(val_set), "damaged": len(faces.damaged)}  # fmt: skip
        _announce(counts, student, criterion, teacher.kind)
        position = run.restore(parts, Plan(cfg.epochs * steps, cfg.batch_size, data=counts))
        with run.for_all():
            before = _verified_before(cfg, world, student, position.step)

        for epoch in run.epochs(cfg.epochs):
            if stopping.should_stop:
                break
            arc_only = epoch < cfg.warmup_epochs
            loader = run.batches(train_set, per_process, workers=cfg.workers)
            for images, labels, wanted in _on_device(loader, teacher, preprocess, world):
                with amp.autocast():
                    terms = criterion.terms(net(images, labels), wanted, world)
                loss = criterion.total(terms, arc_only=arc_only)
                pulls = balance.measure(terms, position.step)
                amp.backward(loss)
                if run.replays:
                    run.show(student, _samples(student, criterion, images, labels, wanted))
                amp.step(optimizer, trainable, clip_norm=cfg.largest_norm)
                mean_loss.add(loss)
                shown = {f"Loss/{name}": term for name, term in terms.items()}
                measured = _say_balance(position.step + 1, balance, terms, pulls)
                run.step({"Loss/Total": loss, **shown, "LR": schedule.get_last_lr()[0]},
                         terms=measured)  # fmt: skip

            monitored = mean_loss
            if len(val_set):
                run.save()  # a stop in the validation loses nothing
                rest = make_eval_loader(val_set, per_process, world, workers=cfg.workers, least=2)
                held_out = _on_device(run.watched(rest, "validation"), teacher, preprocess, world)
                monitored = _validation(criterion, student, held_out, world, arc_only=arc_only)
            epoch_loss = monitored.value()
            if epoch <= cfg.warmup_epochs:
                stopping.reset()  # until here the loss had another composition
            improved = stopping.update(epoch_loss)
            _report(cfg, run, epoch_loss, stopping)
            if world.is_main:
                student_files.save_epoch(cfg.run_dir, student, epoch + 1,
                                         is_best=improved, full=cfg.full_checkpoint)  # fmt: skip
            schedule.step()
            mean_loss.reset()
        with run.for_all():
            ending = _ending(cfg, world, student, before, stopping)
        run.finish(**ending)
    return run.exit_code


# --- the loss -------------------------------------------------------------------------------------


def _validation(
    criterion: Distillation, student: FaceStudent, batches: Iterator[Any], world: World, *,
    arc_only: bool,
) -> Mean:  # fmt: skip
    """The mean total over this process's share of the held-out images, relations in each batch."""
    import torch

    from shared.amp import Mean

    mean = Mean(world)
    student.eval()
    with torch.no_grad():
        for images, labels, wanted in batches:
            terms = criterion.terms(student(images, labels), wanted)
            mean.add(criterion.total(terms, arc_only=arc_only), len(images))
    student.train()
    return mean


def _samples(
    student: FaceStudent, criterion: Distillation, images: Tensor, labels: Tensor, wanted: Any
) -> list[replay.Sample]:
    """Each image with its own losses; the relations are of pairs, and are not among them."""
    import torch

    from face_distill.distill.losses import attention_transfer

    _, maps, kind = wanted
    samples = []
    for row, image in enumerate(images):
        one = slice(row, row + 1)
        with torch.no_grad():
            _, tokens, arc = student(images[one], labels[one])
            attention = attention_transfer(tokens, maps[one], criterion.at_mode, kind)
        terms = {"ArcFace": float(arc), "AT": float(attention)}
        losses = {name: criterion.weights[name] * term for name, term in terms.items()}
        samples.append(replay.Sample(losses, f"identity {int(labels[row])}", replay.png(image)))
    return samples


def _say_balance(
    step: int, balance: Balance, terms: dict[str, Tensor], pulls: dict[str, float]
) -> dict[str, float]:
    """Log what each term pulls at step 1, and after a hundred steps one that drowns the others.

    pulls: where they were measured at this step. Returns them under their tags.
    """
    if pulls and step == 1:
        everything = sum(pulls.values()) or 1.0
        shown = [
            f"{name} {float(term.detach()):.4g} x {balance.factors[name]:g}, "
            f"{100 * pulls[name] / everything:.2g} % of the gradients on the adapters"
            for name, term in terms.items()
        ]
        log.info(" | ".join(shown))
    found = balance.dominant() if pulls and step == balance.steps[-1] + 1 else None
    if found:
        log.warning(
            "%s has %.3g times ArcFace's gradient on the adapters in the first steps: it decides "
            "alone what they learn; lower --lambda-%s", found[0], found[1], found[0].lower(),
        )  # fmt: skip
    return {f"Pull/{name}": pull for name, pull in pulls.items()}


def _announce(
    counts: dict[str, int], student: FaceStudent, criterion: Distillation, kind: str
) -> None:
    """Log what is trained on what."""
    from face_distill.distill import model

    log.info("%d images of %d identities, %d held out, %d damaged left out", *counts.values())
    log.info(
        "%s | attention transfer %s on %s maps, RKD over %s pairs",
        model.summary(student), criterion.at_mode, kind, criterion.rkd_norm,
    )  # fmt: skip


# --- the data, the epochs, the end ----------------------------------------------------------------


def _on_device(
    loader: Any, teacher: TeacherFeatures, preprocess: Any, world: World
) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor, str]]]:
    """Images (B, 3, S, S) normalised, labels (B,), the teacher's embeddings, maps, kind of maps."""
    for images, labels, indices in loader:
        embeddings, maps = (rows.to(world.device) for rows in teacher.rows(indices))
        faces = preprocess(images.to(world.device, non_blocking=True))
        yield faces, labels.to(world.device), (embeddings, maps, teacher.kind)


def _num_classes(cfg: Config, faces: FaceDataset) -> int:
    """Classes of the head. Raises UserError when they are fewer than the identities found."""
    found = faces.num_classes
    wanted = found if cfg.num_classes == "auto" else int(cfg.num_classes)
    if wanted < found:
        raise UserError(
            f"--num-classes {wanted} is below the {found} identities of the selected images; "
            f"use auto, or {found} and above"
        )
    return wanted


def _report(cfg: Config, run: Run, loss: float, stopping: EarlyStopping) -> None:
    """Log an epoch's loss, and whether it counts yet."""
    run.log({"epoch/loss": loss}, split="epoch")
    run.log({"epoch/lowest_loss": stopping.best}, split="best")
    epoch, kind = run.position.epoch + 1, "validation" if cfg.val_fraction else "training"
    if epoch <= cfg.warmup_epochs:
        text = "epoch %d/%d: ArcFace alone (warm-up) | %s loss %.4f"
        log.info(text, epoch, cfg.epochs, kind, loss)
        return
    begins = " with all terms from here on" if epoch == cfg.warmup_epochs + 1 else ""
    log.info(
        "epoch %d/%d%s | %s loss %.4f | lowest %.4f | %d of %d epochs without a lower one",
        epoch, cfg.epochs, begins, kind, loss, stopping.best, stopping.bad, cfg.patience,
    )  # fmt: skip


def _accuracy(cfg: Config, world: World, student: FaceStudent) -> float:
    """The student's ten-fold accuracy on --verify's pairs."""
    from face_distill.distill import pairs, verification
    from face_distill.distill.images import Preprocess

    assert cfg.verify is not None
    preprocess = Preprocess(student.image_size).to(world.device)

    def embed(images: Tensor) -> Tensor:
        stop.check()
        return student(preprocess(images.to(world.device)))[0]

    student.eval()
    accuracy = verification.verify(embed, pairs.read_pairs(cfg.verify))
    student.train()
    return accuracy.mean


def _verified_before(cfg: Config, world: World, student: FaceStudent, step: int) -> float | None:
    """Accuracy before the first step; of a resumed run, the one noted then; None on other ranks."""
    from shared.checkpoint import beside

    note = cfg.run_dir / "verification.json"
    if not (cfg.verify and world.is_main):
        return None
    if step > 0:
        written = read_object(note)
        return written.get("before") if written.get("pairs") == str(cfg.verify) else None
    before = _accuracy(cfg, world, student)
    with beside(note):
        write_json(note, {"pairs": str(cfg.verify), "before": before})
    return before


def _ending(
    cfg: Config, world: World, student: FaceStudent, before: float | None, stopping: EarlyStopping
) -> dict[str, Any]:
    """What the run ends with: why, which files, and the best student's accuracy against before."""
    from face_distill.distill import model
    from face_distill.distill.pairs import read_pairs
    from face_distill.distill.student_files import BEST
    from shared.checkpoint import beside

    files = sorted(cfg.run_dir.glob("*student_adapter_face*.pth"))
    reason = f"the loss did not fall for {stopping.bad} epochs" if stopping.should_stop else ""
    ending: dict[str, Any] = {"outputs": [str(path) for path in files], "reason": reason}
    if before is None or not cfg.verify or not (cfg.run_dir / BEST).exists():
        return ending
    model.load_student(student, cfg.run_dir / BEST)
    after = _accuracy(cfg, world, student)
    note = cfg.run_dir / "verification.json"
    with beside(note):
        write_json(note, {"pairs": str(cfg.verify), "before": before, "after": after})
    is_demos = cfg.run.demo and "verify" not in cfg.run.typed
    pairs = "drawn pairs" if is_demos else cfg.verify.stem
    log.info("verification accuracy (%s): %.4f untrained, %.4f trained", pairs, before, after)
    result = {
        "name": f"verification accuracy ({pairs})",
        "before": before,
        "after": after,
        "higher_is_better": True,
        "chance": 0.5,
        "n": len(read_pairs(cfg.verify).same),
    }
    return ending | {"result": result}


# --- settings, files, processes -------------------------------------------------------------------


def _with_demo(cfg: Config) -> Config:
    """`cfg` on the built-in data: its paths where none were typed."""
    from face_distill.demo_data import demo

    root = Path(PROJECT_ROOT) / "demo"
    paths = demo.build(root)
    changes = {
        "blip_path": paths.weights,
        "data_root": paths.data_root,
        "teacher_feat_dir": paths.teacher,
        "verify": paths.pairs,
    }
    changes = {name: value for name, value in changes.items() if name not in cfg.run.typed}
    run_dir = cfg.run.run_dir or root / "runs" / "checkpoints"
    return replace(cfg, **changes, run=replace(cfg.run, run_dir=run_dir))


def _check_batch_size(batch_size: int, processes: int) -> None:
    if batch_size < 2:
        raise UserError(
            f"--batch-size {batch_size}: the loss compares pairs of images; use 2 or more"
        )
    if batch_size % processes:
        below = batch_size // processes * processes
        near = " or ".join(str(size) for size in (below, below + processes) if size)
        raise UserError(
            f"--batch-size {batch_size} is for all processes together and cannot be split over "
            f"{processes}; use {near}, or another --nproc"
        )


def _check_files(cfg: Config) -> None:
    """Refuse missing inputs in one line each, before anything slow is imported."""
    folder_of_folders = cfg.data_root.is_dir() and any(p.is_dir() for p in cfg.data_root.iterdir())
    if not (cfg.data_root / "train.rec").is_file() and not folder_of_folders:
        raise UserError(
            f"{cfg.data_root} holds no faces: expected train.rec, train.idx and property of "
            "faces_emore, or <identity>/<image> folders; unpack them there, or type --data-root"
        )
    for name in ("teacher_embedding.npy", "teacher_feat_map.npy"):
        if not (cfg.teacher_feat_dir / name).is_file():
            raise UserError(
                f"{cfg.teacher_feat_dir / name} is missing: put teacher_features_12k next to "
                "train_distill.py, or type --teacher-feat-dir PATH"
            )
    if not (cfg.blip_path / "config.json").is_file():
        raise UserError(
            f"{cfg.blip_path / 'config.json'} is missing: fetch the BLIP-2 weights with "
            "python download_weight.py, or type --blip-path PATH"
        )
    if cfg.verify and not cfg.verify.is_file():
        raise UserError(f"--verify {cfg.verify} is missing: expected lfw.bin or another pair file")


def _plan(cfg: Config) -> str:
    processes = world_size()
    return (
        f"{cfg.epochs} epochs of {cfg.data_root}, {cfg.batch_size} images a step = {processes} "
        f"process(es) x {cfg.batch_size // processes}; checkpoints in {cfg.run_dir}, charts in "
        f"{cfg.tensorboard}"
    )


def _prove(cfg: Config) -> int:
    """Hold the ways to take the same step against each other; the exit code."""
    from shared.prove import NEAR, Case, most_processes, prove

    number, why_not = most_processes(cfg.run)
    total = max(2, cfg.batch_size // number) * number
    own = total // world_size()
    plain = ["--amp", "off", "--no-gradient-checkpointing", "--micro-batch", own,
             "--batch-size", total, "--warmup-epochs", 0]  # fmt: skip
    cases = [
        Case(f"one = {number} processes", [*plain, "--nproc", 1], [*plain, "--nproc", number],
             why_not=why_not),
        Case("whole = micro-batches", plain, [*plain, "--micro-batch", max(1, own // 2)]),
        Case("checkpointed = plain", plain, [*plain, "--gradient-checkpointing"]),
        Case("bfloat16 near float32", plain, [*plain, "--amp", "bf16"], NEAR),
    ]  # fmt: skip
    always = ["--log-dir", "{here}/logs"]
    return prove(cfg.run, cfg.run_dir, ("student",), cases, always)


def processes_that_fit(argv: list[str], visible: int) -> int:
    """How many of the visible GPUs share BATCH_SIZE evenly, when the user did not type a size."""
    cfg = parse(Config, argv, demo=DEMO)
    if "batch_size" in cfg.run.typed:
        return visible
    return max(count for count in range(1, visible + 1) if cfg.batch_size % count == 0)


if __name__ == "__main__":
    sys.exit(launch(main, processes_that_fit))
