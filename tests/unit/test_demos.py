"""The data that demos draw: of one seed always the same, made once, made again when not whole."""

import contextlib
import hashlib
from pathlib import Path
from unittest import mock

import pytest

from arcface.demo_data import inshop_tree as garments
from face_distill.demo_data import demo as faces
from lavic.demo_data import demo as products
from multimodal.demo_data import demo as pairs
from tests import lavic_nano, multimodal_data
from tests.trainings import FEW_FACES
from vasevqa.demo_data import vases

pytestmark = pytest.mark.slow
DEMOS = {  # what builds it, the sizes that are patched, a file whose loss is noticed
    "face_distill": (faces.build, {faces: FEW_FACES}, "train.rec"),
    "arcface": (garments.build, {garments: {"NUM_TRAIN_ITEMS": 2, "NUM_TEST_ITEMS": 1}}, "*.jpg"),
    "lavic": (products.build, lavic_nano.UNTAUGHT, "model.safetensors"),
    "multimodal": (pairs.build, multimodal_data.SMALL, "captions_train2017.json"),
    "vasevqa": (vases.build_images, {vases: {"NUM_VASES": 5, "NUM_LABELLED": 3}}, "*.jpg"),
}  # fmt: skip


@pytest.fixture(params=DEMOS)
def demo(request):
    """(what builds a small one, the file to lose)."""
    build, patches, lost = DEMOS[request.param]
    with contextlib.ExitStack() as stack:
        for module, sizes in patches.items():
            stack.enter_context(mock.patch.multiple(module, **sizes))
        yield build, lost


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def digests(root: Path) -> dict[str, str]:
    """{file: sum} of all but weights, which differ from one machine to another."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files_of(root)
        if path.suffix != ".safetensors"
    }


def test_a_finished_demo_is_kept_one_that_lacks_a_file_is_made_again_and_a_seed_draws_its_own(
    demo, tmp_path
):
    build, lost = demo
    first, other = tmp_path / "first", tmp_path / "other"
    build(first, seed=0)
    before = {path: path.stat().st_mtime_ns for path in files_of(first)}
    build(first, seed=0)
    assert {path: path.stat().st_mtime_ns for path in files_of(first)} == before
    whole = digests(first)
    next(first.rglob(lost)).unlink()
    build(first, seed=0)
    assert digests(first) == whole and set(files_of(first)) == set(before)
    build(other, seed=1)
    assert len(whole) > 5
    assert len(set(whole.values()) - set(digests(other).values())) > len(whole) / 2
