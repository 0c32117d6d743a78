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
from multimodal.training.report import Report
from shared.errors import UserError
from tests import multimodal_data


@pytest.fixture(scope="session")
def made():
    return multimodal_data.made()


@pytest.fixture(scope="session")
def run_dir(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("outputs")
    keywords = list(Clotho(made.clotho, "val").label_names)
    multimodal_data.untrained(root, keywords, data_root=str(made.data_root))
    return root


@pytest.fixture(scope="session")
def model(run_dir):
    return open_trained(run_dir / "checkpoints/best_model.pt", torch.device("cpu")).model


def evaluated_to(out, *flags):
    """What a call has written."""
    assert evaluate.main([*map(str, flags), "--out", str(out)]) == 0
    return json.loads((out / "evaluation.json").read_text())


@pytest.fixture(scope="session")
def evaluated(run_dir):
    """What one call over all data sets has written."""
    flags = ["--checkpoint", run_dir, "--workers", "0", "--batch-size", "50"]
    return evaluated_to(run_dir / "evaluation", *flags)


def test_evaluation_has_the_houses_form_and_names_split_and_numbers(evaluated, run_dir, made):
    assert evaluated["schema"] == 1
    assert evaluated["checkpoint"] == str(run_dir / "checkpoints/best_model.pt")
    assert evaluated["data"] == str(made.data_root)
    counts = evaluated["counts"]
    assert counts["coco"]["split"] == "Karpathy test"
    assert (counts["coco"]["items"], counts["coco"]["captions"]) == (8, 40)
    assert counts["audiocaps"]["skipped"] == {"missing": 1}
    rows = {(row["data set"], row["direction"]): row for row in evaluated["retrieval"]}
    assert len(rows) == 8
    assert (rows["clotho", "text to audio"]["queries"], counts["clotho"]["keywords"]) == (30, 12)
    shares = [v for row in evaluated["retrieval"] for v in row.values() if isinstance(v, float)]
    shares += evaluated["metrics"].values()
    assert len(shares) > 8 * 5 and all(0 <= value <= 1 for value in shares)


def test_figures_are_those_of_the_models_features_by_brute_force(evaluated, model, made):
    data = Coco(made.coco, "test", image_size=64)
    with torch.no_grad():
        images = model.encode_image(torch.stack([data.image(i) for i in range(len(data))]))
        ids, mask = samples.tokenise([text for i in range(len(data)) for text in data.captions(i)])
        texts = model.encode_text(ids, mask)
    best = (texts @ images.T).topk(5).indices
    owners = torch.arange(8).repeat_interleave(5)[:, None]
    for k in (1, 5):
        share = float((best[:, :k] == owners).any(1).double().mean())
        assert evaluated["metrics"][f"coco/text_to_image/R@{k}"] == pytest.approx(share)
    found = float(((images @ texts.T).argmax(1) // 5 == torch.arange(8)).double().mean())
    assert evaluated["metrics"]["coco/image_to_text/R@1"] == pytest.approx(found)


def test_limit_val_and_one_data_set(run_dir, tmp_path, capsys):
    flags = ["--checkpoint", run_dir / "checkpoints/best_model.pt", "--split", "val"]
    record = evaluated_to(
        tmp_path, *flags, "--datasets", "coco", "--limit", "7", "--workers", "1"
    )  # fmt: skip
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
    flags = ["--checkpoint", run_dir, "--data-root", tmp_path, "--workers", "0", "--no-report"]
    (row,) = evaluated_to(tmp_path, *flags)["retrieval"]
    assert (row["direction"], row["queries"], row["gallery"]) == ("voice to voice", 12, 11)
    assert row["chance"] == pytest.approx(1 / 11, abs=1e-4)


def test_report_of_the_run_gets_the_tables(made, tmp_path):
    multimodal_data.untrained(tmp_path, [], data_root=str(made.data_root))
    with Report(tmp_path, {"data": []}) as report:
        report.close("done", "1 step")
    flags = ["--checkpoint", tmp_path, "--datasets", "coco", "--limit", "5", "--workers", "0"]
    evaluated_to(tmp_path / "a", *flags)
    (path,) = (tmp_path / "reports").glob("report_*.json")
    stored = json.loads(path.read_text())
    assert stored["retrieval"][0]["split"] == "Karpathy test"
    assert stored["evaluation"]["counts"]["coco"]["items"] == 5
    text = path.with_suffix(".md").read_text()
    assert "| coco | Karpathy test | image to text |" in text and "mAP of categories" in text
    before = path.read_text()
    evaluated_to(tmp_path / "b", *flags, "--no-report")
    assert path.read_text() == before


def test_picture_that_breaks_is_left_out_of_the_figures(made, run_dir, tmp_path, monkeypatch):
    real, spoilt = samples.read_picture, Coco(made.coco, "test").path(3)

    def read(path, size):
        if path == spoilt:
            raise ValueError("damaged in the middle")
        return real(path, size)

    monkeypatch.setattr(samples, "read_picture", read)
    flags = ["--checkpoint", run_dir, "--datasets", "coco", "--workers", "0", "--no-report"]
    counts = evaluated_to(tmp_path, *flags)["counts"]["coco"]
    assert (counts["items"], counts["captions"]) == (7, 35)
    assert list(counts["skipped"].values()) == [1]


def test_data_that_is_not_there_is_said(run_dir, tmp_path):
    flags = ["--checkpoint", str(run_dir), "--data-root", str(tmp_path), "--out", str(tmp_path)]
    with pytest.raises(UserError, match=r"holds no coco, clotho, audiocaps, voxceleb"):
        evaluate.main(flags)


# --- embed.py -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(made, run_dir, tmp_path_factory):
    """One call: pictures (one of them broken), sounds, texts, labels and a query."""
    root = tmp_path_factory.mktemp("embed")
    folder = root / "照片 $(touch X)"
    shutil.copytree(made.coco / "train2017", folder)
    (folder / "broken.jpg").write_bytes(b"")
    (folder / "speech.m4a").write_bytes(b"x")
    (root / "texts.txt").write_text("a red circle\n\n two  blue stars \n")
    (root / "labels.txt").write_text("circle\nstar\n")
    sounds = sorted((made.clotho / "validation").iterdir())[:3]
    flags = ["--checkpoint", run_dir, "--out", root / "out", "--images", folder, "--workers", 0]
    flags += ["--audio", *sounds, "--texts", root / "texts.txt", "--labels", root / "labels.txt"]
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("sys.stdout.write", said.append)
        assert embed.main([*map(str, flags), "--query", "two blue stars"]) == 0
    return root / "out", folder, sounds, "".join(said).splitlines()


def test_files_in_rows_out(asked, model):
    out, folder, sounds, _ = asked
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
    with torch.no_grad():
        expected = model.encode_image(
            torch.stack([samples.read_picture(folder / name, 64) for name in names["images"][:2]])
        )
    assert np.allclose(rows["images"][:2], expected.numpy(), atol=1e-5)


def test_a_query_prints_the_ten_files_nearest_to_it(asked):
    out, _, _, lines = asked
    names = json.loads((out / "embeddings.json").read_text())
    query = np.load(out / "texts.npy")[1]  # the same text
    for kind, count in (("images", 10), ("audio", 3)):
        scores = np.load(out / f"{kind}.npy") @ query
        at = lines.index(f"{kind} for two blue stars") + 1
        shown = [line.split(maxsplit=1) for line in lines[at : at + count]]
        order = np.argsort(-scores)[:count]
        assert [name for _, name in shown] == [names[kind][index] for index in order]
        assert np.allclose([float(score) for score, _ in shown], scores[order], atol=1e-3)
    assert len(lines) == 2 + 10 + 3 + 57  # and the label of each file


def test_labels_are_told_with_shares_that_add_up(asked):
    out, _, sounds, _ = asked
    found = json.loads((out / "zero_shot.json").read_text())
    assert len(found) == 57 and str(sounds[0]) in found
    for shares in found.values():
        assert set(shares) == {"circle", "star"}
        assert math.isclose(sum(shares.values()), 1, abs_tol=1e-5)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
