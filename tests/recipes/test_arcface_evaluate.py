"""evaluate.py: the figures of a trained retriever, as JSON, text and a page of pictures."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from arcface import evaluate
from arcface.inshop_retrieval.evaluation import Split, choose
from arcface.inshop_retrieval.evaluation import evaluate as score
from arcface.inshop_retrieval.inshop import LEFT_OUT, Garment, read
from arcface.run_scripts import run_arcface
from shared.distributed import World
from shared.files import read_json_lines
from tests.arcface_nano import build_inshop, write_config
from tests.harness import run_here


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inshop(tmp_path_factory) -> Path:
    return build_inshop(tmp_path_factory.mktemp("nano"), 4, 5)


@pytest.fixture(scope="module")
def run_dir(inshop, tmp_path_factory) -> Path:
    """A run of one epoch, validated after it."""
    place = tmp_path_factory.mktemp("run")
    config = write_config(place / "nano.py")
    args = ["--config", config, "--data-root", inshop, "--work-dir", place / "work"]
    options = ["--cfg-options", "train_cfg.max_epochs=1", "train_cfg.val_before_train=False"]
    assert run_here(run_arcface.main, [*args, *options]).code == 0
    return place / "work"


def test_a_run_directory_gives_the_figures_of_its_training(run_dir, tmp_path):
    outcome = run_here(evaluate.main, ["--checkpoint", run_dir, "--out", tmp_path / "out"])
    assert outcome.code == 0, outcome.text
    written = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    rows = [row for row in read_json_lines(run_dir / "metrics.jsonl") if row["split"] == "val"]
    assert len(written["metrics"]) == 7
    for name, value in written["metrics"].items():
        assert value == pytest.approx(rows[-1][name], rel=1e-6), name
    assert written["counts"] == {
        "queries": 15, "queries_without_gallery_picture": 0, "queries_unreadable": 0,
        "queries_in_list": 15, "gallery": 15, "gallery_unreadable": 0,
    }  # fmt: skip
    assert Path(written["checkpoint"]).name.startswith("best_retrieval_Recall@1_epoch_1")
    table = (tmp_path / "out" / "retrieval.txt").read_text()
    assert re.search(rf"retrieval/mAP@10 +{written['metrics']['retrieval/mAP@10']:.4f}\n", table)
    assert table in outcome.text


def test_a_limit_takes_queries_from_the_whole_list_and_the_page_shows_their_nearest(
    run_dir, tmp_path
):
    args = ["--checkpoint", run_dir / "last.pt", "--out", tmp_path / "out"]
    assert run_here(evaluate.main, [*args, "--limit", 5, "--examples", 4]).code == 0
    counts = json.loads((tmp_path / "out" / "retrieval.json").read_text())["counts"]
    assert (counts["queries"], counts["queries_in_list"], counts["gallery"]) == (5, 15, 15)
    page = (tmp_path / "out" / "contact_sheet.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4 * 11
    assert len(re.findall(r"<figcaption>[✓✗] -?[01]\.\d{3}</figcaption>", page)) == 4 * 10
    assert "http" not in page.replace("http-equiv", "")


def test_failures_are_among_the_examples_and_the_choice_repeats():
    right = torch.tensor([True] * 50 + [False] * 30 + [True] * 20)
    shown = choose(right, 24, seed=0)
    assert len(shown) == 24 == len(set(shown)) and shown == sorted(shown)
    assert sum(not right[row] for row in shown) == 12
    assert shown == choose(right, 24, seed=0) != choose(right, 24, seed=1)
    assert choose(torch.tensor([True, False]), 24, seed=0) == [0, 1]
    assert len(choose(torch.tensor([False] * 30), 24, seed=0)) == 24


class Stripes:
    """Pictures whose level is their item's; some cannot be read."""

    def __init__(self, items, unreadable=()):
        self.labels, self.unreadable = torch.tensor(items), unreadable

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = torch.zeros(3, 4, 4, dtype=torch.uint8)
        image[int(self.labels[index]) % 3] = 200 + index
        place = LEFT_OUT if index in self.unreadable else index
        return Garment(image, int(self.labels[index]), place, False)


class Means(torch.nn.Module):
    """The mean colour of a picture: tells items 0, 1 and 2 apart."""

    dim = 3

    def forward(self, images):
        return images.mean((2, 3))


def test_unreadable_pictures_are_left_out_of_queries_and_gallery():
    query = Split(Stripes([0, 1, 2, 0], unreadable=[1]), 3, 0)
    # of item 2 only an unreadable picture is in the gallery: its query has no answer
    gallery = Split(Stripes([1, 0, 2, 0], unreadable=[2]), 3, 0)
    outcome = score(Means(), lambda images: images.float(), query, gallery, World())
    assert outcome.query_places.tolist() == [0, 2, 3]
    assert outcome.gallery_places.tolist() == [0, 1, 3]
    assert outcome.retrieval.num_queries == 2
    assert outcome.retrieval.without_positive == [1]
    assert outcome.metrics["Recall@1"] == 1.0
    assert outcome.metrics["mAP@10"] == 1.0


# --- pictures of one's own ------------------------------------------------------------------------


@pytest.fixture
def folders(inshop, tmp_path) -> Path:
    """<class>/<image> of all nine items, and one class of a single picture."""
    for path in (inshop / "Img" / "img").rglob("*.jpg"):
        place = tmp_path / "mine" / path.parent.name / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    (tmp_path / "mine" / "single").mkdir()
    (tmp_path / "mine" / "single" / "one.jpg").write_bytes(path.read_bytes())
    return tmp_path / "mine"


def test_a_directory_of_classes_is_trained_on_and_evaluated(folders, tmp_path):
    config = write_config(tmp_path / "nano.py")
    args = ["--config", config, "--data-root", folders, "--work-dir", tmp_path / "work"]
    options = ["--cfg-options", "train_cfg.max_epochs=1"]
    outcome = run_here(run_arcface.main, [*args, *options, "--seed", 3])
    assert outcome.code == 0, outcome.text
    told = "43 pictures of 8 classes are trained on; of 2 held-out classes 6 pictures are queries"
    assert told in outcome.text and "43 pictures of 8 items" in outcome.text
    head = torch.load(tmp_path / "work" / "epoch_1.pth")["parts"]["head"]["weight"]
    assert head.shape == (8, 512)  # as many as there are, whatever the file says
    assert run_here(run_arcface.main, ["--resume", tmp_path / "work" / "epoch_1.pth"]).code == 0
    again = ["--checkpoint", tmp_path / "work", "--out", tmp_path / "out"]
    assert run_here(evaluate.main, again).code == 0
    written = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    rows = list(read_json_lines(tmp_path / "work" / "metrics.jsonl"))
    last = [row for row in rows if row["split"] == "val"][-1]
    assert written["metrics"]["retrieval/mAP@10"] == pytest.approx(last["retrieval/mAP@10"])


def test_classes_are_split_by_the_seed_and_one_picture_never_queries(folders):
    splits = [read(folders, seed=seed) for seed in range(8)]
    assert read(folders, seed=0) == splits[0] and len({split.query for split in splits}) > 4
    for split in splits:
        held_out = {picture.item for picture in split.query}
        assert held_out == {picture.item for picture in split.gallery} and len(held_out) == 2
        assert "single" not in held_out
        assert "single" in {picture.item for picture in split.train}
        assert not held_out & {picture.item for picture in split.train}
        assert len(split.train) + len(split.query) + len(split.gallery) == 55


@pytest.mark.parametrize("has_labels", [True, False])
def test_the_ten_nearest_of_a_directory(has_labels, run_dir, folders, tmp_path):
    query = folders if has_labels else tmp_path / "flat"
    for path in [] if has_labels else sorted(folders.rglob("*.jpg"))[:7]:
        query.mkdir(exist_ok=True)
        (query / f"{path.parent.name}_{path.name}").write_bytes(path.read_bytes())
    args = ["--checkpoint", run_dir, "--gallery", folders, "--query", query]
    outcome = run_here(evaluate.main, [*args, "--out", tmp_path / "out", "--examples", 3])
    assert outcome.code == 0, outcome.text
    written = json.loads((tmp_path / "out" / "neighbours.json").read_text())
    assert len(written["queries"]) == (55 if has_labels else 7) and written["gallery"] == 55
    for entry in written["queries"]:
        scores = [found["score"] for found in entry["nearest"]]
        assert len(scores) == 10 and scores == sorted(scores, reverse=True)
        assert scores[0] == pytest.approx(1, abs=1e-5)  # the picture itself is in the gallery
        item = Path(entry["query"]).parent.name
        for found in entry["nearest"]:
            same = Path(found["picture"]).parent.name == item if has_labels else None
            assert found["same"] == same
    lines = (tmp_path / "out" / "neighbours.csv").read_text().splitlines()
    assert lines[0] == "query,rank,picture,score,same"
    assert len(lines) == 1 + 10 * len(written["queries"])
    page = (tmp_path / "out" / "contact_sheet.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3 * 11
    assert Image.open(tmp_path / "out" / "contact_sheet.jpg").size == (11 * 104, 3 * 104)
