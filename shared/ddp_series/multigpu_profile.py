"""Step 2 under the profiler: where the time of a training step is spent, in each process.

python multigpu_profile.py 2 1               # six training steps, in profile/
python multigpu_profile.py 2 1 --nproc 2 --trace_dir traces
"""

import sys
import tempfile
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path


def parse_args(argv: list[str] | None = None) -> Namespace:
    """What was typed; at a mistake argparse says what is wrong and exits with code 2."""
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("total_epochs", type=int, help="epochs to train")
    add("save_every", type=int, help="epochs between two checkpoints")
    add("--batch_size", "--batch-size", type=int, default=32, help="samples per process and step")
    add("--checkpoint_path", "--checkpoint-path", type=Path, default="checkpoint.pt", help="output")
    add("--nproc", type=int, help="processes, in place of one per GPU")
    add("--trace_dir", "--trace-dir", default="profile", help="directory of the traces")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, int) and value < 1:
            parser.error(f"{name} must be 1 or more, got {value}")
    if not args.checkpoint_path.parent.is_dir():
        parser.error(f"checkpoint_path {args.checkpoint_path}: there is no such directory")
    return args


if __name__ == "__main__":
    parse_args()  # before torch is imported, so that --help and mistakes are answered at once

import torch
import torch.distributed as dist
import torch.distributed.nn  # pyright: ignore[reportUnusedImport] later, it would keep the group
from datautils import MyTrainDataset
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.profiler import profile, schedule, tensorboard_trace_handler
from torch.utils.data import DataLoader, DistributedSampler


def ddp_setup(rank: int, world_size: int, store: str) -> None:
    """Join the other processes: over nccl on GPUs, a GPU for each, or over gloo on the CPU."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world_size)


def load_train_objs() -> tuple[MyTrainDataset, nn.Module, Optimizer]:
    """Dataset, model and optimizer."""
    torch.manual_seed(0)  # the same initial weights in every run
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 1))
    return MyTrainDataset(2048), model, SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(rank: int, world_size: int, store: str, args: Namespace) -> None:
    """The whole training, in each process."""
    ddp_setup(rank, world_size, store)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset, model, optimizer = load_train_objs()
    ddp_model = DistributedDataParallel(model.to(device))  # backward() averages the gradients
    sampler = DistributedSampler(dataset)  # a share of the samples for each process
    train_data = DataLoader(dataset, args.batch_size, sampler=sampler)
    profiler = profile(
        schedule=schedule(wait=2, warmup=2, active=6, repeat=1),
        on_trace_ready=tensorboard_trace_handler(args.trace_dir, f"rank{rank}"),
    )
    profiler.start()

    for epoch in range(args.total_epochs):
        torch.manual_seed(epoch * world_size + rank)  # for dropout and the like
        sampler.set_epoch(epoch)  # another order of the samples in each epoch
        total_loss = torch.zeros((), device=device)
        for source, targets in train_data:
            optimizer.zero_grad()
            output = ddp_model(source.to(device))
            loss = nn.functional.mse_loss(output, targets.to(device))
            loss.backward()
            optimizer.step()
            total_loss += loss.detach()
            profiler.step()
        print(f"[rank {rank}] Epoch {epoch} | Loss: {total_loss / len(train_data):.6f}", flush=True)

        due = (epoch + 1) % args.save_every == 0 or epoch + 1 == args.total_epochs
        if due and rank == 0:
            torch.save(model.state_dict(), args.checkpoint_path)
            print(f"Epoch {epoch} | Checkpoint saved at {args.checkpoint_path}", flush=True)
    profiler.stop()
    if rank == 0:
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=8))
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    """Start the processes, and wait for them."""
    args = parse_args(argv)
    gpus = torch.cuda.device_count()
    world_size = args.nproc or gpus or 1
    if 0 < gpus < world_size:
        print(
            f"multigpu_profile.py: error: --nproc {world_size}: there are {gpus} GPUs",
            file=sys.stderr,
        )
        sys.exit(2)
    with tempfile.TemporaryDirectory() as folder:  # for the file by which the processes meet
        spawn(train, (world_size, f"file://{folder}/store", args), nprocs=world_size)


if __name__ == "__main__":
    main()
