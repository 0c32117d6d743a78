"""evaluate.py and embed.py with a model of random weights on the demo's files."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from multimodal import embed, evaluate
from multimodal.datasets import Clotho, Coco
from multimodal.pairs import samples
from multimodal.training.evaluation import open_trained
from shared.errors import UserError
from tests import multimodal_demo


@pytest.fixture(scope="session")
def made():
    return multimodal_demo.made()


@pytest.fixture(scope="session")
def run_dir(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("outputs")
    keywords = list(Clotho(made.clotho, "val").label_names)
    multimodal_demo.untrained(root, keywords, data_root=str(made.data_root))
    return root


@pytest.fixture(scope="session")
def evaluated(run_dir):
    """What one call over all data sets has written."""
    flags = ["--checkpoint", str(run_dir), "--workers", "0", "--batch-size", "50"]
    assert evaluate.main(flags) == 0
    return json.loads((run_dir / "evaluation/evaluation.json").read_text())


def test_evaluation_has_the_houses_form_and_names_split_and_numbers(evaluated, run_dir, made):
    assert evaluated["schema"] == 1
    assert evaluated["checkpoint"] == str(run_dir / "checkpoints/best_model.pt")
    assert evaluated["data"] == str(made.data_root)
    counts = evaluated["counts"]
    assert counts["coco"]["split"] == "Karpathy test"
    assert (counts["coco"]["items"], counts["coco"]["captions"]) == (100, 500)
    assert counts["audiocaps"]["skipped"] == {"missing": 2}
    rows = {(row["data set"], row["direction"]): row for row in evaluated["retrieval"]}
    assert len(rows) == 8
    assert (rows["clotho", "text to audio"]["queries"], counts["clotho"]["keywords"]) == (300, 12)
    assert all(0 <= value <= 1 for value in evaluated["metrics"].values())
    shares = [v for row in evaluated["retrieval"] for v in row.values() if isinstance(v, float)]
    assert len(shares) == 8 * 5 and all(0 <= value <= 1 for value in shares)


def test_figures_are_those_of_the_models_features_by_brute_force(evaluated, run_dir, made):
    model = open_trained(run_dir / "checkpoints/best_model.pt", torch.device("cpu")).model
    data = Coco(made.coco, "test", image_size=64)
    with torch.no_grad():
        images = model.encode_image(torch.stack([data.image(i) for i in range(len(data))]))
        ids, mask = samples.tokenise([text for i in range(len(data)) for text in data.captions(i)])
        texts = model.encode_text(ids, mask)
    best = (texts @ images.T).topk(5).indices
    owners = torch.arange(100).repeat_interleave(5)[:, None]
    for k in (1, 5):
        share = float((best[:, :k] == owners).any(1).double().mean())
        found = evaluated["metrics"][f"coco/text_to_image/R@{k}"]
        assert found == pytest.approx(share, abs=0.005)  # texts are cut to the batch's longest
    found = float(((images @ texts.T).argmax(1) // 5 == torch.arange(100)).double().mean())
    assert evaluated["metrics"]["coco/image_to_text/R@1"] == pytest.approx(found, abs=0.011)


def test_limit_val_and_one_data_set(run_dir, tmp_path, capsys):
    flags = ["--checkpoint", str(run_dir / "checkpoints/best_model.pt"), "--split", "val"]
    flags += ["--datasets", "coco", "--limit", "7", "--out", str(tmp_path), "--workers", "1"]
    assert evaluate.main(flags) == 0
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["counts"]["coco"]["split"] == "Karpathy val"
    assert record["counts"]["coco"]["items"] == 7 and list(record["counts"]) == ["coco"]
    table = (tmp_path / "evaluation.txt").read_text()
    assert "R@1" in table and "image to text" in table and table in capsys.readouterr().out
    found = record["metrics"]["coco/image_to_text/R@1"]
    assert f"  {100 * found:.1f} %" in table.splitlines()[1]


def test_voices_without_faces_find_their_speaker(made, run_dir, tmp_path):
    (tmp_path / "voxceleb").mkdir()
    for name in ("wav", "vox1_meta.csv"):
        (tmp_path / "voxceleb" / name).symlink_to(made.voxceleb / name)
    flags = ["--checkpoint", str(run_dir), "--data-root", str(tmp_path), "--out", str(tmp_path)]
    assert evaluate.main([*flags, "--workers", "0", "--no-report"]) == 0
    record = json.loads((tmp_path / "evaluation.json").read_text())
    (row,) = record["retrieval"]
    assert (row["direction"], row["queries"], row["gallery"]) == ("voice to voice", 48, 47)
    assert row["chance"] == pytest.approx(3 / 47, abs=1e-4) and row["R@1"] > row["chance"]


def test_report_of_the_run_gets_the_tables(made, tmp_path):
    from multimodal.training.report import Report

    multimodal_demo.untrained(tmp_path, [], data_root=str(made.data_root))
    with Report(tmp_path, {"data": []}) as report:
        report.close("done", "1 step")
    flags = ["--checkpoint", str(tmp_path), "--datasets", "coco", "--limit", "9", "--workers", "0"]
    assert evaluate.main(flags) == 0
    (path,) = (tmp_path / "reports").glob("report_*.json")
    stored = json.loads(path.read_text())
    assert stored["retrieval"][0]["split"] == "Karpathy test"
    assert stored["evaluation"]["counts"]["coco"]["items"] == 9
    text = path.with_suffix(".md").read_text()
    assert "| coco | Karpathy test | image to text |" in text and "mAP of categories" in text
    before = path.read_text()
    assert evaluate.main([*flags, "--no-report"]) == 0
    assert path.read_text() == before


def test_picture_that_breaks_is_left_out_of_the_figures(made, run_dir, tmp_path, monkeypatch):
    root = tmp_path / "data"
    shutil.copytree(made.coco, root / "coco")
    real, spoilt = samples.read_picture, Coco(root / "coco", "test").path(3)

    def read(path, size):
        if path == spoilt:
            raise ValueError("damaged in the middle")
        return real(path, size)

    monkeypatch.setattr(samples, "read_picture", read)
    flags = ["--checkpoint", str(run_dir), "--data-root", str(root), "--out", str(tmp_path)]
    assert evaluate.main([*flags, "--workers", "0", "--no-report"]) == 0
    counts = json.loads((tmp_path / "evaluation.json").read_text())["counts"]["coco"]
    assert (counts["items"], counts["captions"]) == (99, 495)
    assert list(counts["skipped"].values()) == [1]


def test_data_that_is_not_there_is_said(run_dir, tmp_path):
    flags = ["--checkpoint", str(run_dir), "--data-root", str(tmp_path), "--out", str(tmp_path)]
    with pytest.raises(UserError, match=r"holds no coco, clotho, audiocaps, voxceleb"):
        evaluate.main(flags)


# --- embed.py -------------------------------------------------------------------------------------


@pytest.fixture
def embedded(made, run_dir, tmp_path):
    """Pictures (one of them broken), sounds, texts and labels through one call."""
    folder = tmp_path / "照片 $(touch X)"
    shutil.copytree(made.coco / "val2017", folder)
    (folder / "broken.jpg").write_bytes(b"")
    (folder / "speech.m4a").write_bytes(b"x")
    (tmp_path / "texts.txt").write_text("a red circle\n\n two  blue stars \n")
    (tmp_path / "labels.txt").write_text("circle\nstar\n")
    sounds = sorted((made.clotho / "validation").iterdir())[:3]
    flags = ["--checkpoint", run_dir, "--out", tmp_path / "out", "--images", folder]
    flags += ["--audio", *sounds, "--texts", tmp_path / "texts.txt", "--workers", 0]
    assert embed.main([*map(str, flags), "--labels", str(tmp_path / "labels.txt")]) == 0
    return tmp_path / "out", folder, sounds


def test_files_in_rows_out(embedded, run_dir):
    out, folder, sounds = embedded
    names = json.loads((out / "embeddings.json").read_text())
    rows = {kind: np.load(out / f"{kind}.npy") for kind in ("images", "audio", "texts")}
    assert {kind: row.shape for kind, row in rows.items()} == {
        "images": (54, 32), "audio": (3, 32), "texts": (2, 32),
    }  # fmt: skip
    assert all(np.allclose(np.linalg.norm(row, axis=1), 1, atol=1e-5) for row in rows.values())
    assert names["audio"] == [str(path) for path in sounds]
    assert names["texts"] == ["a red circle", "two blue stars"]
    assert names["skipped"] == {
        str(folder / "broken.jpg"): "the file is empty",
        str(folder / "speech.m4a"): "no picture and no sound by its name",
    }
    model = open_trained(run_dir / "checkpoints/best_model.pt", torch.device("cpu")).model
    with torch.no_grad():
        expected = model.encode_image(
            torch.stack([samples.read_picture(folder / name, 64) for name in names["images"][:2]])
        )
    assert np.allclose(rows["images"][:2], expected.numpy(), atol=1e-5)


def test_what_is_left_out_is_logged_by_its_name(made, run_dir, tmp_path, caplog):
    shutil.copytree(made.coco / "val2017", tmp_path / "photos")
    for name in ("broken.jpg", "speech.m4a"):
        (tmp_path / "photos" / name).write_bytes(b"")
    flags = ["--checkpoint", run_dir, "--out", tmp_path / "out", "--workers", 0]
    assert embed.main([*map(str, flags), "--images", str(tmp_path / "photos")]) == 0
    for name in ("broken.jpg (the file is empty)", "speech.m4a (no picture and no sound"):
        assert f"left out: {tmp_path / 'photos'}/{name}" in caplog.text


def test_a_query_prints_the_ten_files_nearest_to_it(embedded, run_dir, tmp_path, capsys):
    out, folder, sounds = embedded
    flags = ["--checkpoint", run_dir, "--out", tmp_path / "found", "--images", folder]
    flags += ["--audio", *sounds, "--workers", 0, "--query", "two blue stars"]
    assert embed.main([*map(str, flags)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = json.loads((out / "embeddings.json").read_text())
    asked = np.load(out / "texts.npy")[1]  # the same text
    for kind, count in (("images", 10), ("audio", 3)):
        scores = np.load(out / f"{kind}.npy") @ asked
        at = lines.index(f"{kind} for two blue stars") + 1
        shown = [line.split(maxsplit=1) for line in lines[at : at + count]]
        order = np.argsort(-scores)[:count]
        assert [name for _, name in shown] == [names[kind][index] for index in order]
        assert np.allclose([float(score) for score, _ in shown], scores[order], atol=1e-3)
    assert len(lines) == 2 + 10 + 3


def test_labels_are_told_with_shares_that_add_up(embedded):
    out, _, sounds = embedded
    found = json.loads((out / "zero_shot.json").read_text())
    assert len(found) == 57 and str(sounds[0]) in found
    for shares in found.values():
        assert set(shares) == {"circle", "star"}
        assert math.isclose(sum(shares.values()), 1, abs_tol=1e-5)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
