"""Step 3 of 4: started by torchrun, and restarted by it after a crash, from the last snapshot.

torchrun --standalone --nproc_per_node=2 multigpu_torchrun.py 50 10
torchrun --standalone --nproc_per_node=gpu --max-restarts=3 multigpu_torchrun.py 50 10
"""

import os
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path


def parse_args(argv: list[str] | None = None) -> Namespace:
    """What was typed; at a mistake argparse says what is wrong and exits with code 2."""
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("total_epochs", type=int, help="epochs to train")
    add("save_every", type=int, help="epochs between two snapshots")
    add("--batch_size", "--batch-size", type=int, default=32, help="samples per process and step")
    add("--snapshot_path", "--snapshot-path", type=Path, default="snapshot.pt", help="in and out")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, int) and value < 1:
            parser.error(f"{name} must be 1 or more, got {value}")
    if not args.snapshot_path.parent.is_dir():
        parser.error(f"snapshot_path {args.snapshot_path}: there is no such directory")
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun --standalone --nproc_per_node=2, not with python")
    return args


if __name__ == "__main__":
    parse_args()  # before torch is imported, so that --help and mistakes are answered at once

import torch
import torch.distributed as dist
import torch.distributed.nn  # pyright: ignore[reportUnusedImport] later, it would keep the group
from datautils import MyTrainDataset
from torch import nn
from torch.distributed import PrefixStore, rendezvous  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, DistributedSampler


def ddp_setup() -> None:
    """Join the other processes: over nccl on GPUs, a GPU for each, or over gloo on the CPU."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = next(iter(rendezvous("env://")))
    # torchrun keeps its store: a restart must not find what dead processes wrote (pytorch#135712)
    store = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def load_train_objs() -> tuple[MyTrainDataset, nn.Module, Optimizer]:
    """Dataset, model and optimizer."""
    torch.manual_seed(0)  # the same initial weights in every run
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 1))
    return MyTrainDataset(2048), model, SGD(model.parameters(), lr=0.05, momentum=0.9)


def save_snapshot(path: Path, model: nn.Module, optimizer: Optimizer, epochs_run: int) -> None:
    """Replace the snapshot in one step: a process killed here leaves the old one or the new one."""
    state = {"MODEL_STATE": model.state_dict(), "OPTIMIZER_STATE": optimizer.state_dict()}
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("wb") as file:
        torch.save({"EPOCHS_RUN": epochs_run, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_snapshot(path: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Continue from the snapshot; the number of epochs it has run."""
    if not path.exists():
        return 0
    snapshot = torch.load(path, map_location="cpu", weights_only=True)
    if "EPOCHS_RUN" not in snapshot:
        raise SystemExit(f"{path} is not a snapshot of this script: move it, or type another path")
    model.load_state_dict(snapshot["MODEL_STATE"])
    optimizer.load_state_dict(snapshot["OPTIMIZER_STATE"])
    print(f"Resuming training from {path} at Epoch {snapshot['EPOCHS_RUN']}", flush=True)
    return snapshot["EPOCHS_RUN"]


def main(argv: list[str] | None = None) -> None:
    """The whole training, in each of the processes that torchrun starts."""
    args = parse_args(argv)
    ddp_setup()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dataset, model, optimizer = load_train_objs()
    epochs_run = load_snapshot(args.snapshot_path, model.to(device), optimizer)
    ddp_model = DistributedDataParallel(model)  # backward() averages the gradients
    sampler = DistributedSampler(dataset)  # a share of the samples for each process
    train_data = DataLoader(dataset, args.batch_size, sampler=sampler)

    for epoch in range(epochs_run, args.total_epochs):
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
        print(f"[rank {rank}] Epoch {epoch} | Loss: {total_loss / len(train_data):.6f}", flush=True)

        due = (epoch + 1) % args.save_every == 0 or epoch + 1 == args.total_epochs
        if due and rank == 0:
            save_snapshot(args.snapshot_path, model, optimizer, epoch + 1)
            print(f"Epoch {epoch} | Snapshot saved at {args.snapshot_path}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
