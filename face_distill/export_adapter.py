"""Export the trained adapters as a directory to keep, publish or move to another machine.

python export_adapter.py                                     face_adapter/ of the best student
python export_adapter.py --checkpoint checkpoints/student_adapter_face_epoch_50.pth --out epoch_50
python export_adapter.py --without-head                      leave out the identities' centres
python export_adapter.py --demo                              the student of ./train.sh --demo

Writes model.safetensors, config.json and README.md (a model card); embed.py --checkpoint takes the
directory. The tower's own weights are not in it. Another export that is there is moved aside.
"""

import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared

from shared.config import ToolOptions, option, parse
from shared.errors import UserError
from shared.files import move_aside
from shared.launch import launch_alone

PROJECT_ROOT = Path(__file__).resolve().parent
CHECKPOINT = PROJECT_ROOT / "checkpoints" / "best_student_adapter_face.pth"
BLIP_PATH = PROJECT_ROOT / "blip2_weights"
OUT = PROJECT_ROOT / "face_adapter"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Settings of the export."""

    checkpoint: Path = option(CHECKPOINT, "best_student_adapter_face.pth, …_epoch_N.pth, or a run")
    out: Path = option(OUT, "directory to write")
    without_head: bool = option(False, "leave out the class centres: they tell who was trained on")
    blip_path: Path | None = option(None, "BLIP-2 directory; default: the run's, or blip2_weights")
    tool: ToolOptions = field(default_factory=ToolOptions)


def main(argv: list[str] | None = None) -> int:
    """Check the input, then export; the exit code."""
    cfg = parse(Config, argv, __doc__)
    if cfg.tool.demo:
        cfg = _with_demo(cfg)
    from face_distill.run_settings import checkpoint_at

    checkpoint = checkpoint_at(cfg.checkpoint)
    if checkpoint.is_dir():
        raise UserError(f"{checkpoint} is an export already: give a checkpoint of a run")
    log.info("exporting %s to %s", checkpoint, cfg.out)
    return 0 if cfg.tool.dry_run else _export(cfg, checkpoint)


def _with_demo(cfg: Config) -> Config:
    """`cfg` with the demo's student and tower, where none were typed."""
    from face_distill.run_settings import demo_student

    demo = PROJECT_ROOT / "demo"
    out = cfg.out if "out" in cfg.tool.typed else demo / OUT.name
    return replace(cfg, out=out, **demo_student(demo, cfg.tool.typed))


def _export(cfg: Config, checkpoint: Path) -> int:
    from face_distill import exported

    tower = _tower(cfg, checkpoint)
    state = exported.trained_parts(checkpoint, head=not cfg.without_head)
    content = exported.facts(checkpoint, state, tower)
    if exported.holds(cfg.out, state, content):
        log.info("%s holds this export already: left as it is", cfg.out)
        return 0
    _make_room(cfg.out)
    exported.write(cfg.out, state, content)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    log.info("%d tensors, %.3g MB, in %s", len(state), size / 1e6, cfg.out)
    other = f" --blip-path {tower}" if tower not in (None, BLIP_PATH) else ""
    log.info("try it: python embed.py FOLDER --checkpoint %s%s", cfg.out, other)
    return 0


def _tower(cfg: Config, checkpoint: Path) -> Path | None:
    """The BLIP-2 directory, for the facts about it; an untyped one may be missing."""
    from face_distill.run_settings import tower_of

    try:
        return tower_of(checkpoint, cfg.blip_path, BLIP_PATH)
    except UserError:
        if cfg.blip_path:
            raise
        log.warning("no BLIP-2 tower at hand: the export will not say which one it belongs to")
        return None


def _make_room(out: Path) -> None:
    """Move another export aside; refuse a place that holds anything else."""
    from face_distill.exported import is_export

    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or not is_export(out):
        raise UserError(f"--out {out} holds something else than an export: choose another --out")
    log.info(
        "%s held another export, which is now in %s",
        out,
        move_aside(out, [path.name for path in out.iterdir()]),
    )


if __name__ == "__main__":
    sys.exit(launch_alone(main))
