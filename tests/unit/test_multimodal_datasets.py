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

from multimodal.datasets import AudioCaps, Clotho, Coco, VoxCeleb, collate
from multimodal.demo_data import pictures
from multimodal.pairs import audiocaps, samples
from multimodal.pairs import coco as coco_files
from shared.distributed import World
from shared.errors import UserError
from shared.images import read_rgb
from shared.loader import make_loader
from tests import multimodal_demo
from tests.harness import ROOT


@pytest.fixture(scope="session")
def made():
    return multimodal_demo.made()


@pytest.fixture
def coco(made, tmp_path):
    return shutil.copytree(made.coco, tmp_path / "数据 集/$(touch X) 'coco'")


@pytest.fixture
def clotho(made, tmp_path):
    return shutil.copytree(made.clotho, tmp_path / "clotho")


@pytest.fixture
def caps(made, tmp_path):
    return shutil.copytree(made.audiocaps, tmp_path / "audiocaps")


@pytest.fixture
def voices(made, tmp_path):
    return shutil.copytree(made.voxceleb, tmp_path / "voxceleb")


def numbers(data):
    return [data.group_of(index) for index in range(len(data))]


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- COCO -----------------------------------------------------------------------------------------


def test_karpathys_pictures_are_in_no_training_whichever_half_they_lie_in(made):
    train, val, test = (set(numbers(Coco(made.coco, split))) for split in samples.SPLITS)
    assert (len(train), len(val), len(test)) == (640, 40, 100)
    assert not train & (val | test) and not val & test
    halves = Counter(Coco(made.coco, "test").path(index).parent.name for index in range(100))
    assert halves == {"train2017": 90, "val2017": 10}
    trained = Coco(made.coco, "train")
    assert {trained.path(index).parent.name for index in range(640)} == {"train2017", "val2017"}


def test_without_karpathys_lists_val2017_is_the_test_and_the_name_says_so(coco):
    shutil.rmtree(coco / "karpathy")
    train, val, test = (Coco(coco, split) for split in samples.SPLITS)
    groups = [set(numbers(data)) for data in (train, val, test)]
    assert not groups[0] & groups[1] and not groups[1] & groups[2]
    assert {test.path(index).parent.name for index in range(len(test))} == {"val2017"}
    assert len(test) == 54 and 0 < len(val) < 40 and sum(map(len, groups)) == 780
    assert test.counts.split == "val2017 (no Karpathy lists)"
    assert val.counts.split == "1/50 of train2017 (no Karpathy lists)"


def as_dataset_coco(coco, lists):
    others = {"train": {1}, "restval": {2}}
    listed = [
        {"cocoid": number, "split": split, "filename": file_name(number), "sentids": [1]}
        for split, found in (lists | others).items()
        for number in found
    ]
    (coco / "dataset_coco.json").write_text(json.dumps({"images": listed}))


def as_blip(coco, lists):
    for split, found in lists.items():
        listed = [{"image": f"val2014/{file_name(n)}", "caption": ["a"]} for n in found]
        (coco / f"annotations/coco_karpathy_{split}.json").write_text(json.dumps(listed))


def as_coco(coco, lists):
    for split, found in lists.items():
        listed = {"images": [{"id": n, "file_name": "x.jpg"} for n in found], "annotations": []}
        (coco / f"coco_{split}_karpathy.json").write_text(json.dumps(listed))


def file_name(number):
    return f"COCO_val2014_{number:012d}.jpg"


@pytest.mark.parametrize("write", [as_dataset_coco, as_blip, as_coco])
def test_karpathys_lists_in_every_form_that_is_about(coco, write):
    lists = coco_files.karpathy(coco)
    shutil.rmtree(coco / "karpathy")
    write(coco, lists)
    assert coco_files.karpathy(coco) == lists and len(lists["test"]) == 100


def test_coco_2014_is_read_from_its_own_names(coco):
    for half in ("train", "val"):
        (coco / f"{half}2017").rename(coco / f"{half}2014")
        for kind in ("captions", "instances"):
            path = coco / f"annotations/{kind}_{half}2017.json"
            path.rename(path.with_name(f"{kind}_{half}2014.json"))
    data = Coco(coco, "train")
    assert len(data) == 640 and data.path(0).parent.name in ("train2014", "val2014")


def test_labels_number_the_categories_that_have_gaps_in_their_ids(made):
    data = Coco(made.coco, "test")
    assert len(data.label_names) == 80
    scenes = {scene.category: scene for scene in pictures.all_scenes()}
    assert set(data.label_names) == set(scenes)
    ids = pictures.categories()
    assert max(ids.values()) == 90 and len(set(ids.values())) == 80 and 12 not in ids.values()
    for index in range(len(data)):
        (place,) = data.labels(index).nonzero().flatten().tolist()
        colour, shape = data.label_names[place].split()
        caption = data.captions(index)[0]
        assert colour in caption and shape in caption


def test_evaluation_takes_the_middle_square_and_the_first_caption(made):
    data = Coco(made.coco, "test", image_size=96)
    expected = samples.normalise(read_rgb(data.path(5)))
    assert torch.equal(data[5]["images"], expected)
    ids, _ = samples.tokenise([data.captions(5)[0]])
    assert torch.equal(data[5]["input_ids"], ids[0])
    assert torch.equal(data[5]["images"], data[5]["images"])


def test_normalised_pixels_are_clips():
    white = samples.normalise(torch.full((3, 1, 1), 255, dtype=torch.uint8)).flatten()
    assert white.tolist() == pytest.approx([1.930336, 2.074884, 2.145897], abs=1e-5)


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (400, 400), (300, 900)])
def test_a_circle_stays_a_circle_in_training_and_in_evaluation(tmp_path, size):
    """A dot in the middle, small enough to be in every cut: as high as it is wide."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    inside = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (0.1 * min(size)) ** 2
    Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).convert("RGB").save(
        tmp_path / "a.png"
    )
    torch.manual_seed(0)
    whole = [samples.read_picture(tmp_path / "a.png", 224)]
    cuts = [samples.read_cropped_picture(tmp_path / "a.png", 224) for _ in range(20)]
    seen = 0
    for picture in whole + cuts:
        bright = picture[0] > picture[0].mean() + 1
        high, wide = int(bright.any(1).sum()), int(bright.any(0).sum())
        touches = bright[0].any() or bright[-1].any() or bright[:, 0].any() or bright[:, -1].any()
        if high and not touches:
            seen += 1
            assert high == pytest.approx(wide, abs=3)
    assert seen >= 5


def test_training_draws_captions_and_parts_anew_each_epoch_and_the_same_when_repeated(made):
    data = Coco(made.coco, "train", image_size=32)

    def epoch(number, workers=0):
        loader = make_loader(
            data, 32, World(), seed=0, workers=workers, epoch=number, collate=collate
        )
        batches = list(loader)
        return torch.cat([b["input_ids"] for b in batches]), torch.cat(
            [b["images"] for b in batches]
        )

    first, again, second = epoch(0), epoch(0), epoch(1)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


def damage(folder, data):
    """Spoil five pictures of a split; their numbers by reason."""
    spoilt = dict(zip(["empty", "page", "cut", "zeros", "gone"], numbers(data)[:5], strict=True))
    place = {name: data.path(index) for index, name in enumerate(spoilt)}
    content = place["cut"].read_bytes()
    place["empty"].write_bytes(b"")
    place["page"].write_bytes(b"<!doctype html><title>Log in</title>")
    place["cut"].write_bytes(content[: len(content) // 3])
    place["zeros"].write_bytes(bytes(100))
    place["gone"].unlink()
    return set(spoilt.values())


def test_fault_27_broken_pictures_are_left_out_and_counted(coco, caplog):
    spoilt = damage(coco, Coco(coco, "train"))
    data = Coco(coco, "train")
    assert not spoilt & set(numbers(data)) and len(data) == 635
    assert data.counts.expected == 640 and data.counts.found == 635
    assert sum(data.counts.skipped.values()) == 5 and data.counts.skipped["missing"] == 1
    assert sum("left out" in record.message for record in caplog.records) == 4


def test_fault_27_too_many_broken_pictures_are_refused(coco):
    data = Coco(coco, "val")
    for index in range(3):
        data.path(index).write_bytes(b"")
    with pytest.raises(UserError, match="3 of 40 pictures cannot be used"):
        Coco(coco, "val")


def test_fault_27_picture_that_breaks_later_is_replaced_and_said(coco):
    data = Coco(coco, "val", image_size=32)
    data.path(3).write_bytes(b"")
    batch = collate([data[index] for index in range(6)])
    assert batch["replaced"].tolist() == [False, False, False, True, False, False]
    assert torch.equal(batch["images"][3], batch["images"][4])
    assert data._replacing.skipped.count == 1


def test_pictures_that_are_there_are_used_and_none_is_refused_with_the_expected_name(coco, caplog):
    shutil.rmtree(coco / "train2017")
    assert Coco(coco, "train").counts.found == 40
    assert "40 of 640 pictures of coco Karpathy train are there (6 %)" in caplog.text
    shutil.rmtree(coco / "val2017")
    with pytest.raises(UserError, match=r"none of the 640 pictures .* expected train2017/0000000"):
        Coco(coco, "train")


def test_a_null_caption_of_coco_leaves_out_one_caption(coco):
    path = coco / "annotations/captions_train2017.json"
    content = json.loads(path.read_text())
    number = content["annotations"][0]["image_id"]
    content["annotations"][0]["caption"] = None
    path.write_text(json.dumps(content))
    assert len(coco_files.pictures(coco, 2017)[0][number].captions) == 4


@pytest.mark.parametrize("mode", ["CMYK", "LA", "P", "I;16", "1", "RGBA"])
def test_fault_28_pictures_in_unusual_modes_and_sizes_are_items(coco, mode):
    path = Coco(coco, "val").path(0)
    suffix = "JPEG" if mode == "CMYK" else "PNG"
    Image.new(mode, (7, 3)).save(path, suffix)
    item = Coco(coco, "val", image_size=32)[0]
    assert item["images"].shape == (3, 32, 32) and not item["replaced"]


def test_fault_26_picture_that_claims_to_be_enormous_is_left_out(coco):
    data = Coco(coco, "val")
    Image.new("1", (14_000, 14_000)).save(data.path(0), "PNG")
    assert len(Coco(coco, "val")) == 39


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("captions_val2017", lambda text: text[: len(text) // 2], r"captions_val2017\.json is not"),
        ("instances_train2017", lambda text: "[]", r"instances_train2017\.json is not what COCO"),
        (
            "captions_train2017",
            lambda text: text.replace('"image_id"', '"id_of_image"'),
            "image_id",
        ),
    ],
)
def test_fault_32_bad_json_names_the_file_and_the_place(coco, name, spoil, message):
    path = coco / f"annotations/{name}.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(UserError, match=message):
        Coco(coco, "train")


def test_fault_32_byte_order_mark_and_crlf_are_read(coco):
    path = coco / "annotations/captions_val2017.json"
    text = json.dumps(json.loads(path.read_text()), indent=1).replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(Coco(coco, "val")) == 40


def test_fault_34_file_name_that_leads_out_is_refused(coco):
    path = coco / "annotations/captions_val2017.json"
    edit(path, lambda content: content["images"][0].update(file_name="../../secret.jpg"))
    with pytest.raises(UserError, match="leads out of val2017"):
        Coco(coco, "val")


def test_category_that_is_not_listed_is_refused(coco):
    path = coco / "annotations/instances_val2017.json"
    edit(path, lambda content: content["annotations"][0].update(category_id=12))
    with pytest.raises(UserError, match="category_id 12 is not among the categories"):
        Coco(coco, "val")


def test_coco_that_is_not_there_says_what_fetches_it(tmp_path):
    with pytest.raises(UserError, match=r"download_datasets\.py --datasets coco"):
        Coco(tmp_path, "train")
    with pytest.raises(UserError, match="split 'dev': allowed are train, val, test"):
        Coco(tmp_path, "dev")


# --- Clotho ---------------------------------------------------------------------------------------


def test_clotho_has_three_splits_five_captions_and_odd_names(made):
    train, val, test = (Clotho(made.clotho, split) for split in samples.SPLITS)
    assert (len(train), len(val), len(test)) == (200, 30, 60)
    assert all(len(test.captions(index)) == 5 for index in range(60))
    names = {train.group_of(index) for index in range(200)}
    assert {
        "Rain, far away (dev 0).wav",
        "Glockengeläut dev 7.wav",
        "it's dev 14 o'clock.wav",
    } <= names


def test_clothos_keywords_are_multi_hot_over_the_most_frequent(made):
    data = Clotho(made.clotho, "test")
    with (made.clotho / "clotho_metadata_evaluation.csv").open(encoding="iso-8859-1") as lines:
        keywords = {
            row["file_name"]: set(row["keywords"].split(";")) for row in csv.DictReader(lines)
        }
    for index in range(len(data)):
        found = {data.label_names[i] for i in data.labels(index).nonzero().flatten().tolist()}
        assert found == keywords[data.group_of(index)]
    with (made.clotho / "clotho_metadata_development.csv").open(encoding="iso-8859-1") as lines:
        counted = Counter(w for row in csv.DictReader(lines) for w in row["keywords"].split(";"))
    assert list(data.label_names) == sorted(counted, key=lambda w: (-counted[w], w))


def test_clotho_without_metadata_has_no_labels(clotho):
    for path in clotho.glob("clotho_metadata_*"):
        path.unlink()
    data = Clotho(clotho, "val")
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


def test_batches_fill_up_sounds_and_say_where_they_are(clotho):
    soundfile.write(clotho / "evaluation/evaluation_001.wav", np.ones(8_000, "f4") * 0.1, 16_000)
    data = Clotho(clotho, "test")
    batch = collate([data[0], data[1]])
    assert batch["audio"].shape == (2, 200, 80)
    assert batch["audio_mask"].sum(1).tolist() == [200, 50]
    assert batch["audio_mask"][1, :50].all() and batch["audio"][1, 50:].abs().max() == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text.replace(b"caption_3", b"caption_x", 1), "has no column caption_3"),
        (lambda text: text + b"a.wav,only one\r\n", "line 62: another number of columns"),
        (
            lambda text: text + b"../a.wav,b,c,d,e,f\n",
            r"line 62: file_name '\.\./a\.wav' is no name",
        ),
        (lambda text: text + b"\xff.wav,b,c,d,e,f\n", "line 62: not utf-8-sig"),
    ],
)
def test_fault_32_bad_line_of_a_table_is_named(clotho, spoil, message):
    path = clotho / "clotho_captions_evaluation.csv"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        Clotho(clotho, "test")


def test_fault_27_broken_sounds_are_left_out_and_counted(clotho):
    folder = clotho / "development"
    (folder / "development_001.wav").write_bytes(b"")
    (folder / "development_002.wav").write_bytes(b"<html>")
    (folder / "development_003.wav").unlink()
    data = Clotho(clotho, "train")
    assert (data.counts.found, data.counts.expected) == (197, 200)
    assert data.counts.skipped["missing"] == 1 and sum(data.counts.skipped.values()) == 3


# --- AudioCaps ------------------------------------------------------------------------------------


def test_missing_clips_of_audiocaps_are_counted(made):
    data = AudioCaps(made.audiocaps, "test")
    assert data.counts.text() == "audiocaps test: 48 of 50 (2 missing)"
    assert data.counts.captions == 240 and len(data.captions(0)) == 5
    assert data.path(0).name == f"{data._clips[0].key}.flac"


def test_training_clips_of_audiocaps_have_one_caption(made):
    data = AudioCaps(made.audiocaps, "train")
    assert {len(data.captions(index)) for index in range(len(data))} == {1}
    assert data.counts.text() == "audiocaps train: 144 of 150 (6 missing)"


def test_clotho_without_a_caption_leaves_out_one_clip(clotho):
    path = clotho / "clotho_captions_evaluation.csv"
    rows = path.read_text().splitlines()
    rows[2] = rows[2].split(",")[0] + ",,,,,"
    path.write_text("\n".join(rows) + "\n")
    assert Clotho(clotho, "test").counts.found == 59


def test_clotho_in_capital_letters_is_found(clotho):
    path = clotho / "evaluation" / "evaluation_001.wav"
    path.rename(path.with_suffix(".WAV"))
    data = Clotho(clotho, "test")
    assert data.counts.found == 60
    assert data.sound([data.path(i).suffix for i in range(60)].index(".WAV")).shape[1] == 80


def test_the_clips_of_audiocaps_that_are_there_are_used(caps, caplog):
    paths = sorted((caps / "audio/val").iterdir())
    for path in paths[:12]:
        path.unlink()
    data = AudioCaps(caps, "val")
    assert (data.counts.found, data.counts.expected) == (7, 20)
    assert "7 of 20 clips of audiocaps val are there (35 %)" in caplog.text
    for path in paths[12:]:
        path.unlink()
    expected = r"none of the 20 clips .* expected audio/val/<youtube_id>_<start_time>\.flac"
    with pytest.raises(UserError, match=expected):
        AudioCaps(caps, "val")


@pytest.mark.parametrize("form", ["Y{video}.flac", "{video}_{start}.FLAC", "Y{video}_{start}.flac",
                                  "{video}_{start}.000_{end}.000.flac"])  # fmt: skip
def test_clips_of_audiocaps_have_the_names_that_people_give_them(caps, form):
    for path in (caps / "audio/val").iterdir():
        video, start = path.stem[:11], path.stem[12:]
        path.rename(path.with_name(form.format(video=video, start=start, end=int(start) + 10)))
    data = AudioCaps(caps, "val")
    assert data.counts.found == 19 and data.sound(0).shape[1] == 80


def test_an_empty_caption_of_audiocaps_leaves_out_one_caption(caps):
    rows = (caps / "val.csv").read_text().splitlines()
    rows[1] = ",".join([*rows[1].split(",")[:3], ""])
    (caps / "val.csv").write_text("\n".join(rows) + "\n")
    clips = audiocaps.listed_clips(caps / "val.csv")
    assert len(clips) == 20 and sorted(len(clip.captions) for clip in clips) == [4, *([5] * 19)]


@pytest.mark.parametrize("row", ["1,short,10,a", "1,ABCDEFGHIJK,ten,a", "1,../../../etc,1,a"])
def test_fault_32_bad_row_of_audiocaps_is_named(caps, row):
    with (caps / "val.csv").open("a") as lines:
        lines.write(row + "\n")
    with pytest.raises(UserError, match=r"val\.csv, line 102: youtube_id"):
        AudioCaps(caps, "val")


# --- VoxCeleb -------------------------------------------------------------------------------------


def test_voxceleb_splits_by_speakers(made):
    splits = [VoxCeleb(made.voxceleb, split) for split in samples.SPLITS]
    groups = [set(numbers(data)) for data in splits]
    assert [len(group) for group in groups] == [44, 4, 12]
    assert not groups[0] & groups[1] and not (groups[0] | groups[1]) & groups[2]
    assert groups[2] == {f"id{number}" for number in range(10270, 10282)}
    assert {int(splits[2][index]["speaker"]) for index in range(48)} == set(range(12))


def test_voices_and_faces_of_an_item_are_of_one_video(made):
    data = VoxCeleb(made.voxceleb, "train", image_size=32)
    item = data[0]
    assert item["images"].shape == (3, 32, 32) and item["audio"].shape == (150, 80)
    video = data._items[0].video
    assert all(path.parent.name == video for path in data._faces[data.group_of(0), video])


def test_voxceleb_without_faces_is_voices_with_speakers(voices):
    shutil.rmtree(voices / "faces")
    data = VoxCeleb(voices, "train")
    assert not data.has_faces and set(data[0]) == {"audio", "speaker", "replaced"}


def test_without_the_list_the_test_speakers_are_those_of_voxceleb1(voices):
    (voices / "vox1_meta.csv").unlink()
    assert set(numbers(VoxCeleb(voices, "test"))) == {f"id{n}" for n in range(10270, 10282)}


LISTS = {
    "VoxCeleb1, tabs": (
        "vox1_meta.csv",
        "VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet",
        "\t",
    ),
    "VoxCeleb1, commas": ("vox1_meta.csv", "VoxCeleb1 ID,VGGFace1 ID,Gender,Nationality,Set", ","),
    "VoxCeleb2": ("vox2_meta.csv", "VoxCeleb2 ID ,VGGFace2 ID ,Gender ,Set ", " ,"),
    "lower case": ("vox2_meta.csv", "id,name,gender,set", ", "),
    "no header": ("vox1_meta.csv", None, " "),
}


@pytest.mark.parametrize(("name", "header", "separator"), LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("end", ["\n", "\r\n", " \r\n"])
def test_every_form_of_the_list_names_the_test_speakers(voices, name, header, separator, end):
    (voices / "vox1_meta.csv").unlink()
    everyone = sorted(path.name for path in (voices / "wav").iterdir())
    test = {
        "id10001",
        "id10270",
        "id10271",
    }  # not the twelve that VoxCeleb1's own numbers would give
    rows = [[s, f"Dev_{s}", "f", "test" if s in test else "dev"] for s in everyone]
    lines = [header] * (header is not None) + [separator.join(row) for row in rows]
    (voices / name).write_bytes("".join(line + end for line in lines).encode())
    assert set(numbers(VoxCeleb(voices, "test"))) == test
    rest = {*numbers(VoxCeleb(voices, "train")), *numbers(VoxCeleb(voices, "val"))}
    assert rest == set(everyone) - test


def test_the_list_of_voxceleb2_alone_leaves_voxceleb1s_test_speakers_held_out(voices):
    (voices / "vox1_meta.csv").unlink()
    (voices / "vox2_meta.csv").write_text("VoxCeleb2 ID ,Set \nid00012 ,dev \n")
    assert set(numbers(VoxCeleb(voices, "test"))) == {f"id{n}" for n in range(10270, 10282)}


NO_LISTS = {
    "empty": "",
    "a header alone": "VoxCeleb1 ID,VGGFace1 ID,Gender,Nationality,Set\n",
    "no speakers": "speaker|set\nid10270|test\n",
    "a web page": "<!DOCTYPE html><html>please log in</html>",
}


@pytest.mark.parametrize("content", NO_LISTS.values(), ids=NO_LISTS)
def test_a_list_without_a_known_speaker_is_refused(voices, content):
    (voices / "vox1_meta.csv").write_text(content)
    with pytest.raises(UserError, match=r"vox1_meta\.csv names no speaker: expected lines such as"):
        VoxCeleb(voices, "train")


def test_a_speaker_without_a_set_is_refused_by_line(voices):
    (voices / "vox1_meta.csv").write_text("ID,Set\nid10001,dev\nid10270,tset\n")
    with pytest.raises(UserError, match=r"line 3: id10270 is in none of the sets dev and test"):
        VoxCeleb(voices, "train")


def test_voxceleb_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match="--datasets voxceleb says how"):
        VoxCeleb(tmp_path, "train")


# --- all ------------------------------------------------------------------------------------------


def test_limit_takes_items_from_all_over_the_split(made):
    data = Coco(made.coco, "train", limit=10)
    assert numbers(data) == numbers(Coco(made.coco, "train"))[::64]
    assert data.counts.found == 640
    with pytest.raises(UserError, match="limit 0"):
        Coco(made.coco, "train", limit=0)


@pytest.mark.slow
def test_bare_import_beside_the_file_works_from_anywhere(made):
    code = (
        "from datasets import AudioCaps, Clotho, Coco, VoxCeleb, collate\n"
        "import datasets, pathlib\n"
        f"data = Coco(pathlib.Path({str(made.coco)!r}), 'val', image_size=32)\n"
        "print(collate([data[0], data[1]])['images'].shape, datasets.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=ROOT / "multimodal",
    )  # fmt: skip
    assert done.stdout.split("]) ")[1].strip() == str(ROOT / "multimodal/datasets.py")


def test_importing_the_data_sets_changes_nothing():
    code = (
        f"import sys, os; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch\n"
        "before = (list(sys.path), dict(os.environ), os.getcwd(), torch.random.get_rng_state())\n"
        "import multimodal.datasets\n"
        "after = (list(sys.path), dict(os.environ), os.getcwd(), torch.random.get_rng_state())\n"
        "assert before[:3] == after[:3] and torch.equal(before[3], after[3])\n"
        "assert 'datasets' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
