"""The page of attention maps: what is bright, and that it breaks no run."""

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from face_distill import attention_maps


def pixels_of(markup: str) -> np.ndarray:
    data = re.search(r"base64,([^\"]+)", markup)
    assert data
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))).convert("L"))


def test_a_face_is_bright_where_the_map_is_high_and_dark_where_it_is_low():
    face = np.full((3, 20, 20), 200, np.uint8)
    energy = np.zeros((2, 2), np.float32)
    energy[0, 1] = 5.0
    pixels = pixels_of(attention_maps._picture(face, energy, "x"))
    assert pixels.shape == (112, 112)
    assert pixels[2, -3] > 180 and pixels[-3, 2] < 20
    assert pixels_of(attention_maps._picture(face, None, "x")).min() > 190


def test_a_map_of_one_value_is_no_division_by_zero():
    face = np.full((3, 20, 20), 200, np.uint8)
    assert pixels_of(attention_maps._picture(face, np.ones((2, 2)), "x")).max() < 20


def test_features_are_summed_over_their_channels_and_probabilities_stay():
    features = torch.arange(8.0).view(1, 2, 2, 2)
    assert attention_maps._energy(features).tolist() == [[[16.0, 26.0], [40.0, 58.0]]]
    probabilities = torch.full((1, 2, 2), 0.25)
    assert attention_maps._energy(probabilities).tolist() == probabilities.tolist()


class Student(torch.nn.Module):
    """Tokens whose energy is the mean grey level of each quarter of the picture."""

    image_size = 4

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        quarters = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 2)
        tokens = quarters.flatten(2).transpose(1, 2) * self.scale
        return tokens[:, 0], tokens


def data(images):
    rows = [(image, 0, number) for number, image in enumerate(images)]
    maps = torch.full((len(images), 2, 2), 0.25)
    teacher = SimpleNamespace(rows=lambda indices: (None, maps[torch.tensor(indices)]))
    return SimpleNamespace(val_set=None, train_set=rows, teacher=teacher)


def test_the_page_holds_three_pictures_a_face_and_leaves_the_student_in_training(tmp_path):
    student = Student()
    student.train()
    images = [torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8) for _ in range(9)]
    attention_maps.write(tmp_path, student, data(images))
    page = (tmp_path / "pages" / attention_maps.PAGE).read_text()
    assert page.count("<img") == 3 * 6
    assert student.training and student.scale.grad is None


def test_a_page_that_cannot_be_made_is_a_warning(tmp_path, caplog):
    attention_maps.write(tmp_path, Student(), data([]))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
