"""A trained quality classifier on pictures: probabilities, batch by batch.

predict = ImageQualityPredictor("best_image_quality_model.pth")
label, confidence = predict("vase.jpg")            0 or 1, and how sure
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from shared import images
from vasevqa.filter import quality_net


class ImageQualityPredictor:
    """The net of one file, on a device."""

    def __init__(self, model_path: str | Path, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.net, self.about = quality_net.load_trained(Path(model_path), self.device)
        self.prepare = quality_net.for_evaluation(int(self.about.get("image_size", 224)))

    @torch.inference_mode()
    def probabilities(self, pixels: Tensor) -> Tensor:
        """Prepared pictures (B, 3, S, S) → how likely each is of high quality (B,), on the CPU."""
        return self.net(pixels.to(self.device)).float().softmax(1)[:, 1].cpu()

    def predict(self, path: str | Path) -> tuple[int, float]:
        """The likelier label of a picture, and its probability. Raises ValueError for no image."""
        pixels = self.prepare(images.read_rgb(Path(path)))
        high = float(self.probabilities(pixels[None])[0])
        return (1, high) if high >= 0.5 else (0, 1 - high)

    __call__ = predict
