"""The snapshot that a training continues from."""

import os
from pathlib import Path
from typing import Any

import torch


def save_snapshot(path: Path, parts: dict[str, Any], epochs_run: int) -> None:
    """Replace the snapshot in one step: a process killed here leaves the old one or the new one.

    parts: name -> model, optimizer or whatever else has a state_dict().
    """
    snapshot: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("wb") as file:
        torch.save(snapshot | {"epochs_run": epochs_run}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_snapshot(path: Path, parts: dict[str, Any]) -> int:
    """Continue from the snapshot; the number of epochs it has run, 0 without a snapshot."""
    if not path.exists():
        return 0
    snapshot = torch.load(path, map_location="cpu", weights_only=True)
    if snapshot.keys() != {*parts, "epochs_run"}:
        raise SystemExit(f"{path} is not a snapshot of this script: move it, or type another path")
    for name, part in parts.items():
        part.load_state_dict(snapshot[name])
    return snapshot["epochs_run"]
