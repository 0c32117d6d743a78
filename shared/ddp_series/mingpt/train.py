"""The real-world chapter: a GPT learns to write, character by character.

python train.py                              # on the text beside this file
torchrun --standalone --nproc_per_node=2 train.py --data mine.txt --epochs 40
"""

import math
import os
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path


def parse_args(argv: list[str] | None = None) -> Namespace:
    """What was typed; at a mistake argparse says what is wrong and exits with code 2."""
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    add, default_text = parser.add_argument, Path(__file__).with_name("text.txt")
    add("--data", type=Path, default=default_text, help="UTF-8 text; its last tenth is held out")
    add("--epochs", type=int, default=12, help="passes over the text")
    add("--batch_size", "--batch-size", type=int, default=16, help="blocks per process and step")
    add("--block_size", "--block-size", type=int, default=64, help="characters of context")
    add("--layers", type=int, default=2, help="transformer blocks")
    add("--heads", type=int, default=4, help="attention heads, a divisor of width")
    add("--width", type=int, default=64, help="embedding dimension")
    add("--lr", type=float, default=3e-3, help="learning rate; a cosine takes it to a tenth")
    add("--amp", action="store_true", help="mixed precision in bfloat16, for GPUs")
    add("--snapshot_path", "--snapshot-path", type=Path, default="gpt_snapshot.pt", help="file")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float) and value <= 0:
            parser.error(f"{name} must be above 0, got {value}")
    if args.width % args.heads:
        parser.error(f"heads {args.heads} must divide width {args.width}")
    if not args.snapshot_path.parent.is_dir():
        parser.error(f"snapshot_path {args.snapshot_path}: there is no such directory")
    try:
        args.text = args.data.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"data {args.data} is not a UTF-8 text: {error}")
    if len(args.text) < 20 * args.block_size:
        parser.error(f"data {args.data}: {len(args.text)} characters are less than 20 blocks")
    return args


if __name__ == "__main__":
    parse_args()  # before torch is imported, so that --help and mistakes are answered at once

import torch
import torch.distributed as dist
import torch.distributed.nn  # pyright: ignore[reportUnusedImport] later, it would keep the group
from char_dataset import encode
from model import GPT, cross_entropy, evaluate, generate, parameter_groups
from snapshot import load_snapshot, save_snapshot
from torch import nn
from torch.distributed import HashStore, PrefixStore, rendezvous  # pyright: ignore
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler


def ddp_setup() -> None:
    """Join the processes that torchrun has started; without torchrun this one is alone."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store, rank, world_size = HashStore(), 0, 1
    if "LOCAL_RANK" in os.environ:
        store, rank, world_size = next(iter(rendezvous("env://")))
        store = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def main(argv: list[str] | None = None) -> None:
    """The whole training."""
    args = parse_args(argv)
    ddp_setup()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    text = encode(args.text, args.block_size)
    sampler = DistributedSampler(text.train)
    train_data = DataLoader(text.train, args.batch_size, sampler=sampler)
    held_out_data = DataLoader(text.held_out, args.batch_size)

    torch.manual_seed(0)  # the same initial weights in every run
    gpt = GPT(len(text.vocabulary), args.block_size, args.layers, args.heads, args.width).to(device)
    optimizer = AdamW(parameter_groups(gpt, weight_decay=0.1), lr=args.lr)
    steps = args.epochs * len(train_data)
    schedule = LambdaLR(optimizer, lambda step: 0.55 + 0.45 * math.cos(math.pi * step / steps))
    parts = {"model": gpt, "optimizer": optimizer, "schedule": schedule}
    epochs_run = load_snapshot(args.snapshot_path, parts)
    ddp_model = DistributedDataParallel(gpt)

    for epoch in range(epochs_run, args.epochs):
        torch.manual_seed(epoch * world_size + rank)  # for the shifts of the blocks
        sampler.set_epoch(epoch)
        for tokens, targets in train_data:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                loss = cross_entropy(ddp_model, tokens.to(device), targets.to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if rank == 0:
            loss = evaluate(gpt, held_out_data, device)
            print(f"Epoch {epoch} | Held-out loss: {loss:.4f}", flush=True)
            save_snapshot(args.snapshot_path, parts, epoch + 1)

    if rank == 0:
        after = evaluate(gpt, held_out_data, device)
        print(f"Nats per character: {text.entropy:.3f} without context, {after:.3f} held out")
        prompt = text.held_out[0][0].to(device)
        print("".join(text.vocabulary[token] for token in generate(gpt, prompt, 300).tolist()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
