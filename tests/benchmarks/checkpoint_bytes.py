"""What a save writes and how long the loop stands still for it.

    python tests/benchmarks/checkpoint_bytes.py --megabytes 64 --repeats 7

Bytes: the probe recipe's last.pt; a tiny face student, saved with all of the frozen tower and with
what is trained alone; the same for BLIP-2's real tower, counted on the meta device (no weights are
there). Time: checkpoint.save (temporary file, fsync, rename, the one before kept) and plain
torch.save (which a kill leaves torn) on the same state, on the disk that holds --directory.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import torch
from torch import Tensor, nn

from shared import checkpoint, seed
from shared.amp import Amp
from tests.benchmarks.measure import compare, conclude, in_turn

BYTES, MEGABYTE = 4, 1_000_000  # of a float32; not 2**20
CLASSES = 600  # identities: the documented 12 000 images at 20 each


def probe_state() -> dict[str, Any]:
    """What the probe recipe's checkpoint holds, after one step, without its loop."""
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    net(torch.zeros(1, 4)).sum().backward()
    optimizer.step()
    amp = Amp("off", torch.device("cpu"))
    parts = {"model": net, "optimizer": optimizer, "amp": amp}
    states = {name: part.state_dict() for name, part in parts.items()}
    return {"position": {}, "world_size": 1, "parts": states, "generators": [seed.get_state()]}


def bytes_on_disk(state: dict[str, Any], directory: Path) -> int:
    path = directory / "size.pt"
    checkpoint.save(path, state, keep=1)
    size = path.stat().st_size
    path.unlink()
    return size


def make_student(device: str, **config: Any) -> Any:
    """A face student with adapters in twelve layers spread evenly, or in all of a smaller tower."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    from face_distill.distill.losses import ArcFaceHead
    from face_distill.distill.model import FaceStudent, adapter_layers

    with torch.device(device):
        tower = Blip2VisionModel(Blip2VisionConfig(**config))
        layers = adapter_layers(
            len(tower.encoder.layers), f"spread:{min(12, len(tower.encoder.layers))}"
        )
        return FaceStudent(tower, layers, ArcFaceHead(tower.config.hidden_size, CLASSES))


def student_bytes(student: nn.Module) -> dict[str, int]:
    """Bytes of the tensors in a resumable checkpoint: with the tower, and with what is trained.

    AdamW keeps two tensors for every trained parameter, on either side.
    """
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad) * BYTES
    whole = checkpoint.size_of(student.state_dict())
    return {"full": whole + 2 * trained, "trained": 3 * trained}


def measured_student_bytes(student: nn.Module, directory: Path) -> dict[str, int]:
    """Bytes of the files that the same two kinds of checkpoint come to."""
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values())
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = optimizer.state_dict()
    states = {"full": student.state_dict(), "trained": trained}
    return {
        name: bytes_on_disk({"model": state, "optimizer": moments}, directory)
        for name, state in states.items()
    }


def show(title: str, sizes: dict[str, int]) -> dict[str, float]:
    ratio = sizes["full"] / sizes["trained"]
    full, trained = (sizes[name] / MEGABYTE for name in ("full", "trained"))
    print(f"  {title:<42} {full:>10.2f} MB full {trained:>10.2f} MB trained  {ratio:>6.1f} : 1")
    return {
        "full_bytes": sizes["full"],
        "trained_bytes": sizes["trained"],
        "ratio": round(ratio, 2),
    }


def compare_students(directory: Path) -> dict[str, Any]:
    tiny = make_student(
        "cpu", hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
    )
    real = make_student("meta")  # the defaults are BLIP-2's ViT-g/14
    print("\na resumable checkpoint of the face student")
    return {
        "tiny, files": show("tiny tower, files", measured_student_bytes(tiny, directory)),
        "tiny, tensors": show("tiny tower, tensors by calculation", student_bytes(tiny)),
        "ViT-g, tensors": show("ViT-g/14 tower, tensors by calculation", student_bytes(real)),
    }


def compare_saves(state: dict[str, Tensor], directory: Path, repeats: int) -> Any:
    """Milliseconds of a save, ours and plain, on the same state."""

    def timed(save: Any) -> float:
        begun = time.perf_counter()
        save()
        return (time.perf_counter() - begun) * 1e3

    def plain_and_synced() -> None:
        with (directory / "synced.pt").open("wb") as stream:
            torch.save(state, stream)
            os.fsync(stream.fileno())

    sides = {
        "torch.save": lambda: timed(lambda: torch.save(state, directory / "plain.pt")),
        "torch.save and fsync": lambda: timed(plain_and_synced),
        "checkpoint.save": lambda: timed(lambda: checkpoint.save(directory / "last.pt", state)),
    }
    size = checkpoint.size_of(state) / MEGABYTE
    return compare(f"a save of {size:.0f} MB", "ms", in_turn(sides, repeats), "torch.save")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--directory", type=Path, help="where to write; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        directory = Path(name)
        probe = bytes_on_disk(probe_state(), directory)
        print(f"the probe recipe's checkpoint: {probe} bytes")
        students = compare_students(directory)
        state = {"weights": torch.randn(args.megabytes * MEGABYTE // BYTES)}
        saves = compare_saves(state, directory, args.repeats)
    conclude("checkpoint_bytes", "bytes, ms", probe_bytes=probe, students=students, saves=saves)
    return 0


if __name__ == "__main__":
    sys.exit(main())
