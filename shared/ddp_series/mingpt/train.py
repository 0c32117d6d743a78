"""The real-world chapter: a GPT learns to write, character by character.

python train.py                              # on the text beside this file
torchrun --standalone --nproc_per_node=2 train.py --data mine.txt --epochs 40
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # repository root, for shared

from shared.config import RunOptions, option, parse
from shared.errors import UserError, one_line
from shared.launch import launch

if TYPE_CHECKING:
    from shared.checkpoint import Parts
    from shared.ddp_series.mingpt.char_dataset import Text
    from shared.ddp_series.mingpt.model import GPT
    from shared.distributed import World
log = logging.getLogger(__name__)
TEXT = Path(__file__).resolve().with_name("text.txt")
SAMPLE = 300  # characters to write at the end


@dataclass(frozen=True)
class Config:
    """Settings: data, model, optimizer."""

    data: Path = option(TEXT, "UTF-8 text to learn from; its last tenth is held out")
    epochs: int = option(12, "passes over the text", scope="length")
    batch_size: int = option(16, "blocks a process and step")
    block_size: int = option(64, "characters that the model sees at once")
    layers: int = option(2, "blocks of attention and feed-forward net")
    heads: int = option(4, "attention heads, a divisor of width")
    width: int = option(64, "numbers a character")
    dropout: float = option(0.0, "share left out")
    lr: float = option(3e-3, "learning rate at the start; a cosine takes it to a tenth")
    weight_decay: float = option(0.1, "AdamW's decay of matrices")
    clip: float = option(1.0, "longest norm of the gradients")
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        if min(self.heads, self.block_size) < 1 or self.width % self.heads:
            raise ValueError(f"heads {self.heads} must divide width {self.width}")


def main(argv: list[str] | None = None) -> int:
    """Check what was typed and the text, set up processes, data and model, train; the exit code."""
    cfg = parse(Config, argv, __doc__)
    try:
        text = cfg.data.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data {cfg.data} is no UTF-8 text: {one_line(error)}") from None
    if len(text) < 20 * cfg.block_size:
        raise UserError(f"--data {cfg.data}: {len(text)} characters are less than 20 blocks")
    if cfg.run.dry_run:
        return 0
    from shared import distributed, seed
    from shared.ddp_series.mingpt import model
    from shared.ddp_series.mingpt.char_dataset import encode

    world, data = distributed.setup(cfg.run.device, cfg.run.timeout), encode(text, cfg.block_size)
    seed.seed_all(cfg.run.seed, world.rank)  # all begin with rank 0's weights: DDP sends them
    shape = cfg.block_size, cfg.layers, cfg.heads, cfg.width, cfg.dropout
    gpt = model.GPT(len(data.alphabet), *shape).to(world.device)
    code = fit(cfg, world, gpt, data)
    if code == 0 and world.is_main:
        codes = model.generate(gpt, data.held_out[0][0].to(world.device), SAMPLE).tolist()
        log.info("a sample:\n%s", "".join(data.alphabet[character] for character in codes))
    distributed.cleanup(world)
    return code


def fit(cfg: Config, world: World, gpt: GPT, data: Text) -> int:
    """The loop; the exit code."""
    from torch import optim

    from shared import distributed
    from shared.ddp_series.mingpt.model import loss_of, parameter_groups
    from shared.loader import make_loader
    from shared.precision import Amp
    from shared.reporter import Plan
    from shared.run import Run
    from shared.sampling import steps_per_epoch

    steps = cfg.epochs * steps_per_epoch(len(data.learned), cfg.batch_size, world.size)
    plan = Plan(steps, cfg.batch_size * world.size)
    optimizer = optim.AdamW(parameter_groups(gpt, cfg.weight_decay), lr=cfg.lr)
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=cfg.lr / 10)
    ddp, amp = distributed.wrap(gpt, world), Amp(cfg.run.amp, world.device)
    parts: Parts = {"model": gpt, "optimizer": optimizer, "schedule": schedule, "amp": amp}
    with Run(cfg, world, cfg.run.run_dir or Path("mingpt_run").absolute(),
             "mingpt", last="snapshot.pt") as run:  # fmt: skip
        at = run.restore(parts, plan)
        while at.epoch < cfg.epochs:
            now: Any = {"seed": cfg.run.seed, "epoch": at.epoch, "offset": at.batch}
            for codes, following in make_loader(
                data.learned, cfg.batch_size, world, workers=0, **now
            ):
                with amp.autocast():
                    loss = loss_of(ddp, codes.to(world.device), following.to(world.device))
                amp.backward(loss)
                norm = amp.step(optimizer, gpt.parameters(), clip_norm=cfg.clip)
                schedule.step()
                at.advance()
                run.log({"loss": loss, "grad_norm": norm})
                if run.should_stop():
                    run.save(parts)
                    return run.finish()
            at.next_epoch()
            run.log({"held_out_loss": evaluate(gpt, data, world)}, split="val")
            run.save(parts)
        told = {"before": data.entropy, "after": evaluate(gpt, data, world)}
        log.info("nats a character: %(before).3f without context, %(after).3f held out", told)
        return run.finish(result={"name": "nats a character", **told, "higher_is_better": False})


def evaluate(gpt: GPT, data: Text, world: World) -> float:
    """Nats a character on the text that was held out; the ranks share the work."""
    import torch

    from shared import distributed
    from shared.ddp_series.mingpt.model import loss_of
    from shared.loader import make_eval_loader
    from shared.metrics import Mean

    mean = Mean(world.device)
    with torch.no_grad():
        gpt.eval()
        for codes, following in make_eval_loader(data.held_out, 16, world):
            loss = loss_of(gpt, codes.to(world.device), following.to(world.device))
            mean.add(loss, len(codes))
        gpt.train()
    return mean.of(distributed.total(mean.sums, world))


if __name__ == "__main__":
    sys.exit(launch(main))
