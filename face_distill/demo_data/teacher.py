"""The demo's teacher: Fisher's discriminant analysis, trained on the pictures of many people.

It has seen 500 people; the student's training set has 100 others, the pairs 60 others again. It
looks at pictures of 14 x 14 pixels and knows nothing of how they were drawn: what it says of a
picture is what telling people apart has taught it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from face_distill.demo_data.faces import NUM_LATENTS, SIZE, draw_face, draw_shot, look_of

SIDE = 14  # pixels of what the teacher sees
MAP_SIDE = 7
EMBEDDING_DIM = 24
PEOPLE, PICTURES_EACH = 500, 4
_SHRINKAGE = 0.01  # of the covariance within people towards a round one


class FisherTeacher:
    """Trained when it is made, on people drawn from `rng`."""

    def __init__(self, rng: np.random.Generator, people: int = PEOPLE) -> None:
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        seen = [
            thumbnail(draw_face(look, draw_shot(rng)))
            for look in map(look_of, rng.standard_normal((people, NUM_LATENTS)))
            for _ in range(PICTURES_EACH)
        ]
        labels = np.repeat(np.arange(people), PICTURES_EACH)
        fitted: Any = LinearDiscriminantAnalysis(solver="eigen", shrinkage=_SHRINKAGE)
        fitted.fit(np.stack(seen), labels)
        self._mean = fitted.means_.mean(0)
        self._directions = fitted.scalings_[:, :EMBEDDING_DIM]

    def embeddings(self, thumbnails: np.ndarray) -> np.ndarray:
        """Thumbnails (N, 588) → (N, 24) float32, in units of the deviation within a person."""
        return ((thumbnails - self._mean) @ self._directions).astype(np.float32)

    def maps(self, thumbnails: np.ndarray) -> np.ndarray:
        """From where the embeddings come: each of 7 x 7 places' share, (N, 49) float32, sum 1.

        A place's share is the energy of its pixels' part of the embedding.
        """
        cell = SIDE // MAP_SIDE
        grid = (3, MAP_SIDE, cell, MAP_SIDE, cell)
        pixels = (thumbnails - self._mean).reshape(-1, *grid)
        directions = self._directions.reshape(*grid, EMBEDDING_DIM)
        parts = np.einsum("nchiwj,chiwjd->nhwd", pixels, directions)
        energy = np.square(parts).sum(-1).reshape(len(thumbnails), -1)
        return (energy / energy.sum(1, keepdims=True)).astype(np.float32)


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """A picture, uint8 (112, 112, 3), as the teacher sees it: (588,) float32, 0 to 1."""
    cell = SIZE // SIDE
    small = pixels.reshape(SIDE, cell, SIDE, cell, 3).mean((1, 3), dtype=np.float32) / 255
    return small.transpose(2, 0, 1).ravel()
