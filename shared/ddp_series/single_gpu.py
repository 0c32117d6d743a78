"""Step 1 of 4: one process on one device.

python single_gpu.py 50 10                   # 50 epochs, a checkpoint every 10
python single_gpu.py 50 10 --batch_size 64
"""

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
from datautils import MyTrainDataset
from torch import nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, RandomSampler


def load_train_objs() -> tuple[MyTrainDataset, nn.Module, Optimizer]:
    """Dataset, model and optimizer."""
    torch.manual_seed(0)  # the same initial weights in every run
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 1))
    return MyTrainDataset(2048), model, SGD(model.parameters(), lr=0.05, momentum=0.9)


def main(argv: list[str] | None = None) -> None:
    """The whole training."""
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset, model, optimizer = load_train_objs()
    model.to(device)
    order = torch.Generator()
    sampler = RandomSampler(dataset, generator=order)
    train_data = DataLoader(dataset, args.batch_size, sampler=sampler)

    for epoch in range(args.total_epochs):
        torch.manual_seed(epoch)  # for dropout and the like
        order.manual_seed(epoch)  # another order of the samples in each epoch
        total_loss = torch.zeros((), device=device)
        for source, targets in train_data:
            optimizer.zero_grad()
            output = model(source.to(device))
            loss = nn.functional.mse_loss(output, targets.to(device))
            loss.backward()
            optimizer.step()
            total_loss += loss.detach()
        print(f"Epoch {epoch} | Loss: {total_loss / len(train_data):.6f}", flush=True)

        due = (epoch + 1) % args.save_every == 0 or epoch + 1 == args.total_epochs
        if due:
            torch.save(model.state_dict(), args.checkpoint_path)
            print(f"Epoch {epoch} | Checkpoint saved at {args.checkpoint_path}", flush=True)


if __name__ == "__main__":
    main()
