"""In-shop: the list and its faults, pictures as Pillow makes them, broken files, batches."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from arcface.inshop_retrieval.encoders import Preprocess
from arcface.inshop_retrieval.inshop import LEFT_OUT, InShop, collate, read_list
from arcface.inshop_retrieval.pipeline import build_pipeline, resize
from shared.distributed import World
from shared.errors import UserError
from shared.loader import make_eval_loader
from shared.seed import seed_cpu
from tests.pictures import encoded, picture, with_pillow

TRAIN_STEPS = [
    {"type": "LoadImageFromFile"},
    {"type": "Resize", "scale": 24},
    {"type": "RandomCrop", "crop_size": 20},
    {"type": "RandomFlip", "prob": 0.5, "direction": "horizontal"},
    {"type": "PackInputs"},
]
TEST_STEPS = [
    {"type": "LoadImageFromFile"},
    {"type": "Resize", "scale": 24},
    {"type": "CenterCrop", "crop_size": 20},
    {"type": "PackInputs"},
]
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


LINES = [
    *(f"img/W/A/id_1/0{i}.jpg id_1 train" for i in range(4)),
    *(f"img/W/B/id_2/0{i}.jpg id_2 train" for i in range(4)),
    *(f"img/W/A/id_3/0{i}.jpg id_3 {('query', 'gallery')[i % 2]}" for i in range(4)),
    *(f"img/W/A/id_4/0{i}.jpg id_4 {('gallery', 'query')[i % 2]}" for i in range(4)),
]


def write_list(root, lines=LINES, count=None, end="\n", mark=b""):
    head = [str(len(lines) if count is None else count), "image_name item_id evaluation_status"]
    text = end.join([*head, *lines]) + end
    (root / "Eval").mkdir(parents=True, exist_ok=True)
    path = root / "Eval" / "list_eval_partition.txt"
    path.write_bytes(mark + text.encode())
    return path


@pytest.fixture
def root(tmp_path):
    """A whole data set of 16 pictures."""
    write_list(tmp_path)
    for number, line in enumerate(LINES):
        path = tmp_path / "Img" / line.split()[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number), quality=92))
    return tmp_path


def open_split(root, split, **settings):
    steps = TRAIN_STEPS if split == "train" else TEST_STEPS
    return InShop(root, split, build_pipeline(steps), **settings)


# --- the list -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "mark"), [("\n", b""), ("\r\n", b""), ("\n", b"\xef\xbb\xbf"), ("   \n", b"")]
)
def test_the_list_is_read_whatever_its_line_ends(tmp_path, end, mark):
    found = read_list(write_list(tmp_path, end=end, mark=mark))
    assert [len(found.split(name)) for name in ("train", "query", "gallery")] == [8, 4, 4]
    assert found.train[0] == ("img/W/A/id_1/00.jpg", "id_1")
    assert found.query[0] == ("img/W/A/id_3/00.jpg", "id_3")
    assert found.remarks() == []


def test_items_are_numbered_by_first_appearance_and_alike_in_query_and_gallery(tmp_path):
    lines = [
        *("img/a b_9 train", "img/b b_2 train", "img/c b_9 train"),
        *("img/d t_7 query", "img/e t_5 gallery", "img/f t_7 gallery", "img/g t_5 query"),
    ]
    found = read_list(write_list(tmp_path, lines))
    assert found.labels("train") == [0, 1, 0]
    assert (found.labels("gallery"), found.labels("query")) == ([0, 1], [1, 0])


def test_every_malformed_line_is_known_and_the_first_five_are_spelled_out(tmp_path):
    bad = [
        "img/a id_1",
        "img/a b.jpg id_1 train",
        "img/c id_1 trian",
        "img/../../x id_1 train",
        f"{LINES[0].split()[0]} id_1 query",
        "/etc/passwd id_1 train",
        "img/d id_1 Train",
        "img/e\x07 id_1 train",
    ]
    with pytest.raises(UserError) as caught:
        read_list(write_list(tmp_path, [LINES[0], *bad, *LINES[1:], "img/last"]))
    message = str(caught.value)
    assert "9 malformed line(s)" in message and "and lines 9, 10, 11, 27" in message
    assert "line 4: expected path, item and status, found 2 words: 'img/a id_1'" in message
    assert "line 5: expected path, item and status, found 4 words" in message
    assert "line 6: status 'trian', allowed: train, query, gallery; did you mean train?" in message
    assert "line 7: 'img/../../x' is no path below" in message
    assert "line 8: 'img/W/A/id_1/00.jpg' stands in line 3" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>\n<html>\n", "line 1: expected the number of pictures, found '<!DOCTYPE"),
        (b"", "line 1: expected the number"),
        (b"2\nimg/a id_1 train\nimg/b id_1 train\n", "line 2: expected image_name item_id"),
        (b"2\n", "line 2: expected image_name item_id evaluation_status, found ''"),
        (b"2\na b c\nimg/a i train\n", "line 1 says 2 pictures, 1 lines follow: .*cut off"),
        (b"\xff\xfe1\x00", "cannot be read"),
        (None, r"is missing: the data root must hold .*Img/img"),
    ],
)
def test_a_file_that_is_no_list_is_refused(tmp_path, content, message):
    path = write_list(tmp_path)
    path.write_bytes(content) if content is not None else path.unlink()
    with pytest.raises(UserError, match=message):
        open_split(tmp_path, "train")


def test_queries_without_answer_and_trained_test_items_are_reported_and_kept(root, caplog):
    write_list(root, [*LINES, "img/x id_9 query", "img/y id_1 gallery"])
    found = read_list(root / "Eval/list_eval_partition.txt")
    lonely, seen = found.remarks()
    assert "1 query item(s) have no gallery picture" in lonely and lonely.endswith("id_9")
    assert "1 item(s) of the test are trained on" in seen and seen.endswith("id_1")
    assert found.labels("query")[-1] not in found.labels("gallery")
    open_split(root, "query", max_bad=0.5)
    assert lonely in caplog.text
    caplog.clear()
    open_split(root, "train")
    assert lonely not in caplog.text


def test_an_empty_split_is_refused(tmp_path):
    write_list(tmp_path, LINES[:8])
    with pytest.raises(UserError, match="no line has the status query"):
        open_split(tmp_path, "query")


# --- sizes and cuts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "tolerance"), [((512, 512), 0), ((128, 128), 0), ((448, 448), 2), ((72, 96), 1)]
)
def test_resized_pictures_are_pillows_within_a_grey_level(size, tolerance):
    image = picture(1, 256, 256)
    expected = image.resize(size[::-1], Image.Resampling.BILINEAR)
    ours = resize(with_pillow(encoded(image, "PNG")), *size).permute(1, 2, 0).int()
    difference = (ours - torch.from_numpy(np.array(expected)).int()).abs()
    assert difference.max() <= tolerance
    assert (difference > 1).float().mean() < 1e-4


def test_the_test_pipeline_equals_torchvisions():
    image = with_pillow(encoded(picture(2, 256, 200)))
    steps = [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": 512},
        {"type": "CenterCrop", "crop_size": 448},
        {"type": "PackInputs"},
    ]
    ours, flipped = build_pipeline(steps)(image)
    reference = v2.Compose([v2.Resize((512, 512)), v2.CenterCrop(448)])(tv_tensors.Image(image))
    assert not flipped and ours.shape == (3, 448, 448)
    assert (ours.int() - reference.int()).abs().max() <= 1
    batch = ours[None].contiguous(memory_format=torch.channels_last)
    levels = v2.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD])(ours / 255)
    assert (Preprocess(MEAN, STD)(batch)[0] - levels).abs().max() < 1e-5


def test_random_crops_cover_every_place_and_follow_the_seed():
    pipeline = build_pipeline(TRAIN_STEPS)
    columns = torch.arange(24, dtype=torch.uint8).expand(3, 24, 24)
    found = set()
    for seed in range(300):
        seed_cpu(seed)
        cut, flipped = pipeline(columns)
        found.add((int(cut[0, 0, 0]), flipped))
        seed_cpu(seed)
        again = pipeline(columns)
        assert torch.equal(cut, again[0]) and flipped == again[1]
    assert found == {(left, flip) for left in range(5) for flip in (False, True)}


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        ({"type": "Resize", "scale": (40, 30)}, (30, 40)),  # width, height
        ({"type": "ResizeEdge", "scale": 32}, (32, 64)),
        ({"type": "ResizeEdge", "scale": 50, "edge": "long"}, (25, 50)),
        ({"type": "RandomCrop", "crop_size": [20, 35]}, (20, 35)),  # height, width
        ({"type": "CenterCrop", "crop_size": (35, 20)}, (20, 35)),  # width, height
    ],
)
def test_a_step_gives_the_size_that_mm_users_expect(step, shape):
    steps = [TEST_STEPS[0], step, {"type": "CenterCrop", "crop_size": 20}, TEST_STEPS[3]]
    assert build_pipeline(steps).steps[0](torch.zeros((3, 50, 100))).shape[1:] == shape


LOAD, PACK = TEST_STEPS[0], TEST_STEPS[3]


def of(kind, **settings):
    return {"type": kind, **settings}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("Resize", "expected a list"),
        (TEST_STEPS[1:], "the first step must be dict.type='LoadIm"),
        (TEST_STEPS[:3], "the last step must be dict.type='PackInputs'"),
        ([LOAD, *TEST_STEPS], "stand once, first and last"),
        ([LOAD, of("CentreCrop"), PACK], r"train\.1: there is no step CentreC.* mean CenterCrop"),
        ([LOAD, of("Resize", scales=8), PACK], "no setting scales; allowed are scale.*mean scale"),
        ([LOAD, of("Resize", scale=True), PACK], "scale is True"),
        ([LOAD, of("Resize", scale=8, keep_ratio=True), PACK], "keep_ratio is True, allowed: Fal"),
        ([LOAD, of("RandomFlip", prob=2), PACK], "prob is 2"),
        ([LOAD, of("RandomFlip"), of("RandomFlip"), PACK], "RandomFlip stands 2 times"),
        ([LOAD, of("ResizeEdge", scale=8), PACK], "pictures of different sizes, .*CenterCrop"),
        ([*TEST_STEPS[:2], of("CenterCrop", crop_size=30), PACK], "30 pixels cannot .* out of 24"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused_by_name(steps, message):
    with pytest.raises(UserError, match=message) as caught:
        build_pipeline(steps, "train")
    assert "\n" not in str(caught.value)


# --- the data set ---------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["Img_highres/img", "Img_highres", "Img/img_highres"])
def test_large_pictures_are_found_where_their_archive_unpacks(root, place):
    (root / place).parent.mkdir(exist_ok=True)
    (root / "Img" / "img").rename(root / place)
    data = open_split(root, "train", prefix="Img_highres")
    assert data[0].image.shape == (3, 20, 20) and data.left_out() == []


def test_missing_pictures_are_named_and_counted_up_to_the_share(root, caplog):
    for name in ("00", "02"):
        (root / f"Img/img/W/A/id_1/{name}.jpg").unlink()
    data = open_split(root, "train", max_bad=0.25)
    assert [path[-6:] for path in data.left_out()] == ["00.jpg", "02.jpg"]
    assert caplog.text.count("(missing)") == 2
    with pytest.raises(UserError, match=r"2 of 8 train pictures cannot be read, 1 may be; 2 miss"):
        open_split(root, "train", max_bad=0.125)
    with pytest.raises(UserError, match=r"8 of 8 train pictures cannot be read.*8 missing: .*, …"):
        open_split(root, "train", prefix="Image")


def damage(root, name, content):
    (root / "Img/img/W" / name).write_bytes(content)


def test_a_broken_training_picture_gives_way_to_another_of_its_item(root, caplog):
    damage(root, "A/id_1/00.jpg", b"")
    data = open_split(root, "train", max_bad=0.5)
    for _ in range(2):
        image, label, index, _ = data[0]
        assert (label, index) == (0, 1) and image.any()
    assert caplog.text.count("left out") == 1 and "id_1/00.jpg (the file is empty)" in caplog.text
    assert data.left_out() == [str(root / "Img/img/W/A/id_1/00.jpg")]
    for i in range(1, 4):  # an item without whole pictures gives way to the next
        damage(root, f"A/id_1/0{i}.jpg", b"<html>")
    assert (data[2].position, data[2].label) == (4, 1)


def test_too_many_broken_pictures_end_the_run_and_name_the_last(root):
    whole = encoded(picture())
    for number, content in enumerate((b"", b"<html>", whole[:200])):
        damage(root, f"A/id_1/0{number}.jpg", content)
    data = open_split(root, "train", max_bad=0.25)
    with pytest.raises(UserError, match=r"3 of 8 train pictures .*2 may be; the last one: .*02"):
        data[0]


def test_a_picture_smaller_than_its_cut_is_named(root):
    steps = [TEST_STEPS[0], {"type": "CenterCrop", "crop_size": 40}, TEST_STEPS[3]]
    data = InShop(root, "query", build_pipeline(steps))
    with pytest.raises(UserError, match=r"id_3/00.jpg: 40 pixels cannot be cut out of 32"):
        data[0]


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_broken_test_picture_is_marked_by_a_worker_and_nothing_stands_in(root):
    damage(root, "A/id_3/01.jpg", b"<html>no</html>")
    data = open_split(root, "gallery")
    batches = list(make_eval_loader(data, 2, World(), workers=1, collate=collate))
    assert torch.cat([batch.indices for batch in batches]).tolist() == [LEFT_OUT, 1, 2, 3]
    assert not batches[0].images[0].any() and batches[0].images.shape == (2, 3, 20, 20)
    assert torch.equal(batches[0].images[1], data[1].image) and not batches[0].labels.any()
    assert data.left_out() == [str(root / "Img/img/W/A/id_3/01.jpg")]


def test_preprocessing_mirrors_the_chosen_and_normalises_all():
    images = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    expected = (images.double() - mean) / std
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = Preprocess(MEAN, STD)(
            images.contiguous(memory_format=layout), torch.tensor([False, True, False])
        )
        assert ours.dtype == torch.float32
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert (ours[[0, 2]] - expected[[0, 2]]).abs().max() < 1e-6
        assert (ours[1] - expected[1].flip(2)).abs().max() < 1e-6
    before = images.clone()
    assert (Preprocess(MEAN, STD)(images) - expected).abs().max() < 1e-6
    assert torch.equal(images, before)


def test_a_gpu_gets_the_same_batch_at_once_as_the_cpu_one_by_one():
    preprocess = Preprocess(MEAN, STD)
    levels = torch.randint(0, 256, (4, 5, 7, 3), dtype=torch.uint8)
    for flipped in (None, torch.tensor([True, False, False, True])):
        at_once, one_by_one = preprocess._all_at_once, preprocess._one_by_one
        assert torch.equal(at_once(levels, flipped), one_by_one(levels, flipped))
