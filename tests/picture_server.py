"""A shop's picture server on the loopback, which misbehaves when told to (see tests/hub_server.py).

with PictureServer({"B000000000_0.jpg": jpeg}) as shop:
    shop.misbehave("B000000000_0.jpg", cut(100), times=2)
    ...
    assert shop.times_asked("B000000000_0.jpg") == 3
"""

from __future__ import annotations

import io
import threading
import time
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from tests.hub_server import Answer, HubServer, Request, _Handler


def picture(seed: int = 0, kind: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    """An encoded picture of noise; size: (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, kind)
    return stream.getvalue()


@dataclass
class PictureServer(HubServer):
    """Serves `files` below any path. most_at_once: the largest number of requests at one time."""

    kind: str = "image/jpeg"  # the Content-Type
    delay: float = 0.0  # seconds before each answer
    most_at_once: int = 0
    arrivals: list[tuple[float, str]] = field(default_factory=list)
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def handler(self) -> type[_Handler]:
        return _PictureHandler

    def times_asked(self, name: str) -> int:
        """How often the picture was asked for."""
        return sum(request.path.endswith(f"/{name}") for request in self.requests)

    def entered(self, path: str) -> None:
        with self._lock:
            self.arrivals.append((time.monotonic(), path.rpartition("/")[2]))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)

    def left(self) -> None:
        with self._lock:
            self._now -= 1


class _PictureHandler(_Handler):
    hub: PictureServer

    def _answer(self) -> None:
        self.hub.entered(self.path)
        try:
            time.sleep(self.hub.delay)
            super()._answer()
        finally:
            self.hub.left()

    def _route(self, request: Request) -> tuple[str, Answer]:
        name = request.path.rpartition("/")[2]
        if name not in self.hub.files:
            return name, Answer(404, {}, b"gone")
        whole = Answer(200, {"Content-Type": self.hub.kind}, self.hub.files[name])
        self.hub.fault(name, late=False)(whole)
        return name, whole
