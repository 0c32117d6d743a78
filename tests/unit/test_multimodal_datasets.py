"""COCO, Clotho, AudioCaps and VoxCeleb in their own formats, odd, damaged and incomplete too."""

import csv
import json
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from multimodal.datasets import AudioCaps, Clotho, Coco, DataOptions, VoxCeleb, collate, open_all
from multimodal.demo_data import pictures
from multimodal.pairs import audiocaps, samples
from multimodal.pairs import coco as coco_files
from shared.distributed import World
from shared.errors import UserError
from shared.images import read_rgb
from shared.loader import make_loader
from tests import multimodal_data
from tests.harness import ROOT


@pytest.fixture(scope="session")
def made():
    return multimodal_data.made()


@pytest.fixture
def own(made, tmp_path):
    """A copy of the data root to change, at a place that is hard on paths."""
    return shutil.copytree(made.data_root, tmp_path / "数据 集/$(touch X) 'data'")


@pytest.fixture
def coco(own):
    return own / "coco"


@pytest.fixture
def voices(own):
    return own / "voxceleb"


def numbers(data):
    return [data.group_of(index) for index in range(len(data))]


def edited(path, old, new):
    """Replace the first `old` of a file; b"" is its end."""
    content = path.read_bytes()
    assert old in content, path
    path.write_bytes(content.replace(old, new, 1) if old else content + new)


# --- COCO -----------------------------------------------------------------------------------------


def test_karpathys_pictures_are_in_no_training_whichever_half_they_lie_in(made):
    train, val, test = (set(numbers(Coco(made.coco, split))) for split in samples.SPLITS)
    assert (len(train), len(val), len(test)) == (40, 12, 8)
    assert not train & (val | test) and not val & test
    halves = Counter(Coco(made.coco, "test").path(index).parent.name for index in range(8))
    assert halves == {"train2017": 7, "val2017": 1}
    trained = Coco(made.coco, "train")
    assert {trained.path(index).parent.name for index in range(40)} == {"train2017", "val2017"}


def test_without_karpathys_lists_val2017_is_the_test_and_the_name_says_so(coco):
    shutil.rmtree(coco / "karpathy")
    train, val, test = (Coco(coco, split) for split in samples.SPLITS)
    assert len({*numbers(train), *numbers(val), *numbers(test)}) == 53 + 1 + 6
    assert {test.path(index).parent.name for index in range(6)} == {"val2017"}
    assert (len(train), len(val), len(test)) == (53, 1, 6)
    assert test.counts.split == "val2017 (no Karpathy lists)"
    assert val.counts.split == "1/50 of train2017 (no Karpathy lists)"


def as_dataset_coco(lists):
    listed = [{"cocoid": number, "split": split} for split in lists for number in lists[split]]
    return {"dataset_coco.json": {"images": [*listed, {"cocoid": 2, "split": "restval"}]}}


def as_blip(lists):
    return {
        f"annotations/coco_karpathy_{split}.json": [
            {"image": f"val2014/COCO_val2014_{number:012d}.jpg"} for number in found
        ]
        for split, found in lists.items()
    }


def as_coco(lists):
    return {
        f"coco_{split}_karpathy.json": {"images": [{"id": number} for number in found]}
        for split, found in lists.items()
    }


@pytest.mark.parametrize("form", [as_dataset_coco, as_blip, as_coco])
def test_karpathys_lists_in_every_form_that_is_about(coco, form):
    lists = coco_files.karpathy(coco)
    shutil.rmtree(coco / "karpathy")
    for name, content in form(lists).items():
        (coco / name).write_text(json.dumps(content))
    assert coco_files.karpathy(coco) == lists and len(lists["test"]) == 8


def test_coco_2014_is_read_from_its_own_names(coco):
    for half in ("train", "val"):
        (coco / f"{half}2017").rename(coco / f"{half}2014")
        for kind in ("captions", "instances"):
            path = coco / f"annotations/{kind}_{half}2017.json"
            path.rename(path.with_name(f"{kind}_{half}2014.json"))
    data = Coco(coco, "train")
    assert len(data) == 40 and data.path(0).parent.name in ("train2014", "val2014")


def test_labels_number_the_categories_that_have_gaps_in_their_ids(made):
    data = Coco(made.coco, "test")
    ids = pictures.categories()
    assert max(ids.values()) == 90 and len(set(ids.values())) == 80 and 12 not in ids.values()
    assert set(data.label_names) == set(ids)
    for index in range(len(data)):
        (place,) = data.labels(index).nonzero().flatten().tolist()
        colour, shape = data.label_names[place].split()
        caption = data.captions(index)[0]
        assert colour in caption and shape in caption


def test_evaluation_takes_the_middle_square_and_the_first_caption(made):
    data = Coco(made.coco, "test", image_size=96)
    assert torch.equal(data[5]["images"], samples.normalise(read_rgb(data.path(5))))
    ids, _ = samples.tokenise([data.captions(5)[0]])
    assert torch.equal(data[5]["input_ids"], ids[0])


def test_normalised_pixels_are_clips():
    white = samples.normalise(torch.full((3, 1, 1), 255, dtype=torch.uint8)).flatten()
    assert white.tolist() == pytest.approx([1.930336, 2.074884, 2.145897], abs=1e-5)


@pytest.mark.parametrize("size", [(480, 640), (900, 300)])
def test_a_circle_stays_a_circle_in_training_and_in_evaluation(tmp_path, size):
    """A dot in the middle, small enough to be in every cut: as high as it is wide."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    inside = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (0.1 * min(size)) ** 2
    path = tmp_path / "a.png"
    Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).convert("RGB").save(path)
    torch.manual_seed(0)
    seen = [samples.read_picture(path, 224)]
    seen += [samples.read_cropped_picture(path, 224) for _ in range(20)]
    whole = 0
    for picture in seen:
        bright = picture[0] > picture[0].mean() + 1
        high, wide = int(bright.any(1).sum()), int(bright.any(0).sum())
        touches = bright[0].any() or bright[-1].any() or bright[:, 0].any() or bright[:, -1].any()
        if high and not touches:
            whole += 1
            assert high == pytest.approx(wide, abs=3)
    assert whole >= 5


def test_training_draws_captions_and_parts_anew_each_epoch_and_the_same_when_repeated(made):
    data = Coco(made.coco, "train", image_size=32)

    def epoch(number):
        (batch,) = make_loader(
            data, 32, World(), seed=0, workers=0, epoch=number, collate=collate
        )  # fmt: skip
        return batch["input_ids"], batch["images"]

    first, again, second = epoch(0), epoch(0), epoch(1)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


@pytest.mark.parametrize("spoilt", [[b"", None], [b"<!doctype html><title>Log in</title>", "cut"]])
def test_fault_27_broken_pictures_are_left_out_and_counted(coco, caplog, spoilt):
    data = Coco(coco, "train")
    for index, content in enumerate(spoilt):
        path = data.path(index)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:700] if content == "cut" else content)
    left = Coco(coco, "train")
    assert not set(numbers(data)[:2]) & set(numbers(left))
    assert (left.counts.expected, left.counts.found, len(left)) == (40, 38, 38)
    missing = spoilt.count(None)
    assert sum(left.counts.skipped.values()) == 2
    assert left.counts.skipped.get("missing", 0) == missing
    assert sum("left out" in record.message for record in caplog.records) == 2 - missing


def test_fault_27_too_many_broken_pictures_are_refused(coco):
    Coco(coco, "val").path(0).write_bytes(b"")
    with pytest.raises(UserError, match="1 of 12 pictures cannot be used"):
        Coco(coco, "val")


def test_fault_27_picture_that_breaks_later_is_replaced_and_said(coco):
    data = Coco(coco, "val", image_size=32)
    data.path(3).write_bytes(b"")
    batch = collate([data[index] for index in range(6)])
    assert batch["replaced"].tolist() == [False, False, False, True, False, False]
    assert torch.equal(batch["images"][3], batch["images"][4])


def test_pictures_that_are_there_are_used_and_none_is_refused_with_the_expected_name(coco, caplog):
    shutil.rmtree(coco / "train2017")
    assert Coco(coco, "train").counts.found == 4
    assert "4 of 40 pictures of coco Karpathy train are there (10 %)" in caplog.text
    shutil.rmtree(coco / "val2017")
    with pytest.raises(UserError, match=r"none of the 40 pictures .* expected train2017/0000000"):
        Coco(coco, "train")


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "JPEG"), ("I;16", "PNG")])
def test_fault_28_pictures_in_unusual_modes_and_sizes_are_items(coco, mode, suffix):
    Image.new(mode, (7, 3)).save(Coco(coco, "val").path(0), suffix)
    item = Coco(coco, "val", image_size=32)[0]
    assert item["images"].shape == (3, 32, 32) and not item["replaced"]


def test_fault_26_picture_that_claims_to_be_enormous_is_left_out(coco):
    Image.new("1", (14_000, 14_000)).save(Coco(coco, "train").path(0), "PNG")
    assert len(Coco(coco, "train")) == 39


def test_fault_34_file_name_that_leads_out_is_refused(coco):
    edited(coco / "annotations/captions_val2017.json", b'"file_name": "', b'"file_name": "../../')
    with pytest.raises(UserError, match="leads out of val2017"):
        Coco(coco, "val")


# --- Clotho ---------------------------------------------------------------------------------------


def test_clotho_has_three_splits_five_captions_and_odd_names(made):
    train, val, test = (Clotho(made.clotho, split) for split in samples.SPLITS)
    assert (len(train), len(val), len(test)) == (20, 8, 6)
    assert all(len(test.captions(index)) == 5 for index in range(6))
    odd = ("Rain, far away (dev 0).wav", "Glockengeläut dev 7.wav", "it's dev 14 o'clock.wav")
    assert set(odd) <= set(numbers(train))


def test_clothos_keywords_are_multi_hot_over_the_most_frequent(made):
    def told(split):
        path = made.clotho / f"clotho_metadata_{split}.csv"
        with path.open(encoding="iso-8859-1") as lines:
            return {row["file_name"]: row["keywords"].split(";") for row in csv.DictReader(lines)}

    data, keywords = Clotho(made.clotho, "test"), told("evaluation")
    for index in range(len(data)):
        found = {data.label_names[i] for i in data.labels(index).nonzero().flatten().tolist()}
        assert found == set(keywords[data.group_of(index)])
    counted = Counter(word for words in told("development").values() for word in words)
    assert list(data.label_names) == sorted(counted, key=lambda w: (-counted[w], w))


def test_clotho_without_metadata_has_no_labels(own):
    for path in (own / "clotho").glob("clotho_metadata_*"):
        path.unlink()
    data = Clotho(own / "clotho", "val")
    assert data.label_names == () and data[0]["labels"].sum() == 0


def test_training_hears_a_random_part_and_evaluation_all(made):
    train = Clotho(made.clotho, "train", clip_seconds=0.5)
    torch.manual_seed(0)
    parts = [train[1]["audio"] for _ in range(2)]
    assert parts[0].shape == (50, 80) and not torch.equal(parts[0], parts[1])
    assert Clotho(made.clotho, "test")[1]["audio"].shape == (200, 80)
    assert Clotho(made.clotho, "test", eval_seconds=1.5)[1]["audio"].shape == (150, 80)


def test_cached_features_give_parts_of_the_whole(made, tmp_path):
    whole = Clotho(made.clotho, "test", cache=tmp_path)[1]["audio"]
    torch.manual_seed(0)
    part = Clotho(made.clotho, "test", train=True, clip_seconds=0.5, cache=tmp_path)[1]["audio"]
    assert part.shape == (50, 80)
    assert any(torch.equal(part, whole[start : start + 50]) for start in range(151))


def test_batches_fill_up_sounds_and_say_where_they_are(own):
    path = own / "clotho/evaluation/evaluation_001.wav"
    soundfile.write(path, np.ones(8_000, "f4") * 0.1, 16_000)
    data = Clotho(own / "clotho", "test")
    batch = collate([data[0], data[1]])
    assert batch["audio"].shape == (2, 200, 80)
    assert batch["audio_mask"].sum(1).tolist() == [200, 50]
    assert batch["audio_mask"][1, :50].all() and batch["audio"][1, 50:].abs().max() == 0


@pytest.mark.parametrize(("content", "reason"), [(b"", ""), (b"<html>", ""), (None, "missing")])
def test_fault_27_broken_sounds_are_left_out_and_counted(own, content, reason):
    path = own / "clotho/development/development_001.wav"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    counts = Clotho(own / "clotho", "train").counts
    assert (counts.found, counts.expected) == (19, 20)
    assert sum(counts.skipped.values()) == 1 and reason in (*counts.skipped, "")


def test_clotho_in_capital_letters_is_found(own):
    path = own / "clotho/evaluation/evaluation_001.wav"
    path.rename(path.with_suffix(".WAV"))
    data = Clotho(own / "clotho", "test")
    assert data.counts.found == 6
    assert data.sound([data.path(i).suffix for i in range(6)].index(".WAV")).shape[1] == 80


# --- AudioCaps ------------------------------------------------------------------------------------


def test_missing_clips_of_audiocaps_are_counted(made):
    test, train = AudioCaps(made.audiocaps, "test"), AudioCaps(made.audiocaps, "train")
    assert test.counts.text() == "audiocaps test: 5 of 6 (1 missing)"
    assert test.counts.captions == 25 and len(test.captions(0)) == 5
    assert train.counts.text() == "audiocaps train: 16 of 18 (2 missing)"
    assert {len(train.captions(index)) for index in range(16)} == {1}


def test_none_of_the_clips_of_audiocaps_is_refused_with_the_expected_name(own):
    shutil.rmtree(own / "audiocaps/audio/val")
    expected = r"none of the 8 clips .* expected audio/val/<youtube_id>_<start_time>\.flac"
    with pytest.raises(UserError, match=expected):
        AudioCaps(own / "audiocaps", "val")


@pytest.mark.parametrize("form", ["Y{video}.flac", "{video}_{start}.FLAC",
                                  "{video}_{start}.000_{end}.000.flac"])  # fmt: skip
def test_clips_of_audiocaps_have_the_names_that_people_give_them(own, form):
    for path in (own / "audiocaps/audio/val").iterdir():
        video, start = path.stem[:11], path.stem[12:]
        path.rename(path.with_name(form.format(video=video, start=start, end=int(start) + 10)))
    data = AudioCaps(own / "audiocaps", "val")
    assert data.counts.found == 7 and data.sound(0).shape[1] == 80


@pytest.mark.parametrize("row", ["1,short,10,a", "1,ABCDEFGHIJK,ten,a", "1,../../../etc,1,a"])
def test_fault_32_bad_row_of_audiocaps_is_named(own, row):
    edited(own / "audiocaps/val.csv", b"", row.encode() + b"\n")
    with pytest.raises(UserError, match=r"val\.csv, line 42: youtube_id"):
        AudioCaps(own / "audiocaps", "val")


# --- VoxCeleb -------------------------------------------------------------------------------------

VOXCELEB1S_TEST = {f"id{number}" for number in range(10270, 10276)}  # of those who are there


def test_voxceleb_splits_by_speakers(made):
    splits = [VoxCeleb(made.voxceleb, split) for split in samples.SPLITS]
    train, val, test = (set(numbers(data)) for data in splits)
    assert (len(train), len(val)) == (12, 4) and test == VOXCELEB1S_TEST
    assert not train & val and not (train | val) & test
    assert {int(splits[2][index]["speaker"]) for index in range(12)} == set(range(6))


def test_voices_and_faces_of_an_item_are_of_one_video(voices):
    first, other = sorted((voices / "faces").iterdir())[-2:]
    for folder in ("faces", "wav"):  # the last speaker gets a second video, with another's face
        (video,) = (voices / folder / first.name).iterdir()
        shutil.copytree(video, voices / folder / other.name / "zzzzzzzzzzz")
    data = VoxCeleb(voices, "test", image_size=32)
    shown = [data.path(index).parent.name for index in range(len(data))]
    for index in (shown.index("zzzzzzzzzzz"), shown.index("zzzzzzzzzzz") - 1):
        frames = sorted((voices / "faces" / data.group_of(index) / shown[index]).iterdir())
        assert torch.equal(data[index]["images"], samples.read_picture(frames[1], 32))
        assert data[index]["audio"].shape == (150, 80)


def test_voxceleb_without_faces_is_voices_with_speakers(voices):
    shutil.rmtree(voices / "faces")
    data = VoxCeleb(voices, "train")
    assert not data.has_faces and set(data[0]) == {"audio", "speaker", "replaced"}


LISTS = [  # file, header, separator, end of a line
    ("vox1_meta.csv", "VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet", "\t", "\n"),
    ("vox1_meta.csv", "VoxCeleb1 ID,VGGFace1 ID,Gender,Nationality,Set", ",", "\r\n"),
    ("vox2_meta.csv", "VoxCeleb2 ID ,VGGFace2 ID ,Gender ,Set ", " ,", " \r\n"),
    ("vox2_meta.csv", "id,name,gender,set", ", ", "\n"),
    ("vox1_meta.csv", "", " ", "\n"),
]


@pytest.mark.parametrize(("name", "header", "separator", "end"), LISTS)
def test_every_form_of_the_list_names_the_test_speakers(voices, name, header, separator, end):
    (voices / "vox1_meta.csv").unlink()
    everyone = {path.name for path in (voices / "wav").iterdir()}
    test = {"id10001", "id10270", "id10271"}  # not those that VoxCeleb1's own numbers would give
    rows = [[s, f"Dev_{s}", "f", "test" if s in test else "dev"] for s in sorted(everyone)]
    lines = [header] * bool(header) + [separator.join(row) for row in rows]
    (voices / name).write_bytes("".join(line + end for line in lines).encode())
    assert set(numbers(VoxCeleb(voices, "test"))) == test
    rest = {*numbers(VoxCeleb(voices, "train")), *numbers(VoxCeleb(voices, "val"))}
    assert rest == everyone - test


@pytest.mark.parametrize("listed", [None, "VoxCeleb2 ID ,Set \nid00012 ,dev \n"])
def test_voxceleb1s_test_speakers_are_held_out_where_its_list_is_not_there(voices, listed):
    (voices / "vox1_meta.csv").unlink()
    if listed:
        (voices / "vox2_meta.csv").write_text(listed)
    assert set(numbers(VoxCeleb(voices, "test"))) == VOXCELEB1S_TEST


# --- all ------------------------------------------------------------------------------------------

TOLD = "clotho/clotho_captions_evaluation.csv"
NOTES = "coco/annotations/captions_train2017.json"
TABLE = [  # a file, what is replaced in it (b"" at its end), what is said of it
    (NOTES, b"]}", b"", r"captions_train2017\.json is not what COCO"),
    (NOTES, b'"image_id"', b'"id_of_image"', "image_id"),
    ("coco/annotations/instances_val2017.json", b'"category_id": ', b'"category_id": 9',
     r"category_id 9\d+ is not among the categories"),
    (TOLD, b"caption_3", b"caption_x", "has no column caption_3"),
    (TOLD, b"", b"a.wav,only one\r\n", "line 8: another number of columns"),
    (TOLD, b"", b"../a.wav,b,c,d,e,f\n", r"line 8: file_name '\.\./a\.wav' is no name"),
    (TOLD, b"", b"\xff.wav,b,c,d,e,f\n", "line 8: not utf-8-sig"),
    ("voxceleb/vox1_meta.csv", b"\ttest", b"\ttset", "is in none of the sets dev and test"),
]  # fmt: skip
READERS = {"coco": Coco, "clotho": Clotho, "audiocaps": AudioCaps, "voxceleb": VoxCeleb}


@pytest.mark.parametrize(("name", "old", "new", "message"), TABLE)
def test_fault_32_what_cannot_be_read_is_named_with_its_place(own, name, old, new, message):
    edited(own / name, old, new)
    folder = name.partition("/")[0]
    with pytest.raises(UserError, match=message):
        READERS[folder](own / folder, "test")


@pytest.mark.parametrize("content", ["", "<!DOCTYPE html><html>please log in</html>"])
def test_a_list_without_a_speaker_is_refused(voices, content):
    (voices / "vox1_meta.csv").write_text(content)
    with pytest.raises(UserError, match=r"vox1_meta\.csv names no speaker: expected lines such"):
        VoxCeleb(voices, "train")


def test_what_has_no_caption_is_left_out_and_the_rest_is_read(own):
    """Also with the marks that editors of other systems put into a file."""
    path = own / "coco/annotations/captions_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["caption"] = None
    text = json.dumps(content, indent=1).replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = coco_files.pictures(own / "coco", 2017)[0]
    assert len(found[content["annotations"][0]["image_id"]].captions) == 4
    for name, kept in ((TOLD, 1), ("audiocaps/val.csv", 3)):  # cells that stay
        rows = (own / name).read_text().splitlines()
        cells = next(csv.reader(rows[2:3]))
        rows[2] = ",".join([*cells[:kept], *([""] * (len(cells) - kept))])
        (own / name).write_text("\n".join(rows) + "\n")
    assert Clotho(own / "clotho", "test").counts.found == 5
    clips = audiocaps.listed_clips(own / "audiocaps/val.csv")
    assert sorted(len(clip.captions) for clip in clips) == [4, *([5] * 7)]


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Coco, r"download_datasets\.py --datasets coco"), (VoxCeleb, "--datasets voxceleb says how")],
)
def test_what_is_not_there_says_what_fetches_it(tmp_path, kind, message):
    with pytest.raises(UserError, match=message):
        kind(tmp_path, "train")
    with pytest.raises(UserError, match="split 'dev': allowed are train, val, test"):
        kind(tmp_path, "dev")


@pytest.mark.parametrize(
    ("choice", "clotho", "audiocaps"),
    [
        ("auto", "keywords", "spectrogram"),
        ("keywords", "keywords", None),
        ("spectrogram", "spectrogram", "spectrogram"),
    ],
)
def test_what_sounds_alone_are_for_is_chosen(made, choice, clotho, audiocaps):
    opened = open_all(made.data_root, (), DataOptions(64, sounds_alone=choice)).found
    tasks = {source.name: source.task(0) for source in opened}
    assert {name: task.target for name, task in tasks.items() if task} == {
        name: target
        for name, target in (("coco", "classes"), ("clotho", clotho), ("audiocaps", audiocaps))
        if target
    }


def test_limit_takes_items_from_all_over_the_split(made):
    data = Coco(made.coco, "train", limit=10)
    assert numbers(data) == numbers(Coco(made.coco, "train"))[::4]
    assert data.counts.found == 40
    with pytest.raises(UserError, match="limit 0"):
        Coco(made.coco, "train", limit=0)


@pytest.mark.slow
def test_bare_import_beside_the_file_works_and_takes_the_tokenizer_alone(made):
    code = (
        "from datasets import AudioCaps, Clotho, Coco, VoxCeleb, collate\n"
        "import datasets, pathlib, sys\n"
        f"data = Coco(pathlib.Path({str(made.coco)!r}), 'val', image_size=32)\n"
        "print(list(collate([data[0], data[1]])['images'].shape), datasets.__file__)\n"
        "print({'open_clip', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=ROOT / "multimodal",
    )  # fmt: skip
    assert done.stdout == f"[2, 3, 32, 32] {ROOT / 'multimodal/datasets.py'}\nset()\n"
