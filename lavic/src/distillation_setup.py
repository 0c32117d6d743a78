"""What stage 1 trains and on which data: model with adapter, loss, loaders."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lavic.src.adapters import adapter_parameters, add_adapter, save_adapter
from lavic.src.caption_loss import FixedStart, caption_nll, why_not_reusable
from lavic.src.captions import Batch, Captions, Collate, Step, fixed_tokens
from lavic.src.llava import VISION_TARGETS, add_item_tokens, core_of, load_base
from lavic.src.sample_choice import Found
from shared import distributed
from shared.checkpoint import Position
from shared.distributed import World
from shared.errors import UserError
from shared.loader import make_eval_loader, make_loader

if TYPE_CHECKING:
    from pathlib import Path

    from lavic.src.knowledge_distillation import Config

log = logging.getLogger(__name__)

CHECKPOINT_BELOW = 30 * 10**9  # bytes of a GPU on which the tower's 7 GB of activations are tight
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Learner:
    """LLaVA-NeXT with an adapter on tower and projector, and the loss of a batch."""

    def __init__(self, cfg: Config, world: World, dtype: torch.dtype) -> None:
        base, self.processor = load_base(cfg.model_name, world.device, dtype)
        self.item_ids = add_item_tokens(base, self.processor.tokenizer)
        self.model = add_adapter(
            base, VISION_TARGETS, r=cfg.lora_r, alpha=cfg.lora_alpha, dropout=cfg.lora_dropout
        )
        self.parameters = list(adapter_parameters(self.model).values())
        if _checkpoints_tower(cfg, world.device):
            checkpoint_tower(self.model)
        self.fixed = fixed_tokens(self.processor.tokenizer)
        self._start: FixedStart | None = None
        self.train()

    def keep_start(self, autocast: AbstractContextManager[Any]) -> None:
        """Run what all prompts begin with once, under the precision of the training."""
        reason = why_not_reusable(core_of(self.model).language_model)
        if reason:
            log.info("every prompt is run as a whole: %s", reason)
            return
        with autocast:
            self._start = FixedStart(self.model, self.fixed)

    def nll(self, batch: Batch) -> Tensor:
        """The batch's loss in nats, summed over its labels; a scalar."""
        return caption_nll(self.model, batch, self.item_ids, self._start)

    def train(self) -> None:
        """Dropout on in the adapter; the language model stays in eval."""
        core = core_of(self.model)
        core.vision_tower.train()
        core.multi_modal_projector.train()

    def eval(self) -> None:
        """Dropout off."""
        self.model.eval()

    def save(self, directory: Path) -> None:
        """Write the adapter and the processor."""
        save_adapter(self.model, self.processor, directory)

    def state_dict(self) -> dict[str, Any]:
        """The adapter alone, never the base."""
        named = adapter_parameters(self.model)
        return {name: parameter.detach().cpu().clone() for name, parameter in named.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave. Raises ValueError when it is not of this adapter."""
        own = adapter_parameters(self.model)
        if own.keys() != state.keys():
            raise ValueError(f"an adapter of {len(state)} tensors, this one has {len(own)}")
        for name, parameter in own.items():
            parameter.data.copy_(state[name])


def precision(cfg: Config, device: torch.device) -> tuple[torch.dtype, str]:
    """(the dtype of the frozen weights, the mode for Amp) that the settings mean on this device.

    float16 always comes with loss scaling: the adapter's small gradients would vanish without.
    """
    name = cfg.dtype
    if name == "auto":
        on_gpu = (
            "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float16"
        )
        name = on_gpu if device.type == "cuda" else "float32"
    if name == "float16" and device.type != "cuda":
        raise UserError("--dtype float16 needs a GPU; allowed on the CPU: float32, bfloat16")
    return _DTYPES[name], "fp16" if name == "float16" and cfg.run.amp == "off" else cfg.run.amp


def checkpoint_tower(model: nn.Module) -> None:
    """Keep no activations inside the tower's layers: they are computed again for the gradients.

    Of the tower alone: a language model that does so drops its cache, silently. Not reentrant: the
    reentrant kind gives no gradients to a tower whose input has none, silently too.
    """
    core_of(model).vision_tower.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )


def sum_gradients(parameters: list[nn.Parameter], world: World) -> None:
    """Add up the processes' gradients, in one exchange; a process without any adds zeros.

    DDP in its place would wait for ever for a process whose samples were all left out, and divide
    by the number of processes in place of the number of labels.
    """
    if world.size == 1:
        return
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    everyone = distributed.total(torch.cat([gradient.flatten() for gradient in own]), world)
    parts = everyone.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def _checkpoints_tower(cfg: Config, device: torch.device) -> bool:
    if cfg.gradient_checkpointing != "auto":
        return cfg.gradient_checkpointing == "on"
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(device).total_memory < CHECKPOINT_BELOW


class Data:
    """The samples as steps of this process."""

    def __init__(self, cfg: Config, world: World, found: Found, learner: Learner) -> None:
        self._cfg, self._world = cfg, world
        self._train, self._valid = (
            Captions(samples, learner.processor, cfg.slots, cfg.max_length)
            for samples in (found.train, found.valid)
        )
        pad = learner.processor.tokenizer.pad_token_id
        pad = learner.processor.tokenizer.eos_token_id if pad is None else pad
        self._collate = Collate(cfg.batch_size, pad, learner.fixed)

    def training(self, position: Position) -> Iterator[Step]:
        """The rest of the epoch at `position`."""
        cfg = self._cfg
        return iter(
            make_loader(
                self._train,
                cfg.samples_per_step,
                self._world,
                seed=cfg.run.seed,
                workers=cfg.num_workers,
                epoch=position.epoch,
                offset=position.batch,
                collate=self._collate,
            )
        )

    def validation(self) -> Iterator[Step]:
        """This process's share of the validation, in order."""
        cfg = self._cfg
        return iter(
            make_eval_loader(
                self._valid,
                cfg.batch_size,
                self._world,
                workers=cfg.num_workers,
                collate=self._collate,
            )
        )
