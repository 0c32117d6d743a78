"""What users do wrong with lavic's stage 1: one line that says what and what to do, exit code 2.

SIGTERM, kill -9 and exact resumes are in tests/recipes/test_lavic_distillation.py.
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from lavic.src import crawl_images, knowledge_distillation
from lavic.src.vision.training import Best
from tests.harness import ROOT, environment, run_here
from tests.lavic_nano import build_nano, flags_of

SCRIPT = ROOT / "lavic" / "src" / "knowledge_distillation.py"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture
def flags(paths, tmp_path):
    return flags_of(paths, tmp_path / "out_distilled")


MISTAKES = {
    "a misspelt flag": (["--batch_szie", 4], "--batch-szie; did you mean --batch-size?"),
    "a batch of nothing": (["--batch_size", 0], "batch_size must be a whole number from 1"),
    "a number that is none": (["--max_samples", "many"], "max_samples (all or a number) must be"),
    "no samples": (["--max_samples", 0], "max_samples (all or a number) must be"),
    "an unknown way of slots": (["--slots", "six"], "slots is 'six', allowed: "),
    "dropout of everything": (
        ["--lora_dropout", 1],
        "lora_dropout must be a number from 0 to below 1, got 1.0",
    ),
    "no data there": (["--train_data", "/nowhere.json"], "/nowhere.json cannot be read"),
    "data of another extension": (["--val_data", __file__], "end in .json"),
    "no pictures there": (["--train_images_dir", "/nowhere"], "/nowhere cannot be read"),
    "pictures of other products": (["--train_images_dir", "/"], "no usable sample"),
    "no model there": (["--model_name", "/"], "/config.json is missing"),
    "half precision on the CPU": (["--dtype", "float16"], "--dtype float16 needs a GPU"),
    "fp16 on the CPU": (["--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a GPU"),
    "a run to continue that is not there": (["--resume", "/nowhere"], "no such checkpoint"),
    "an output that cannot be made": (["--output_dir", "/proc/x"], "cannot be written"),
}


@pytest.mark.parametrize(("extra", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_in_one_line(extra, message, flags):
    outcome = run_here(knowledge_distillation.main, [*flags, *extra])
    assert outcome.code == 2, outcome.text
    assert outcome.last_line.startswith("error: ") and message in outcome.last_line
    assert "Traceback" not in outcome.text


def test_fault_35_a_mistake_is_found_before_torch_is_imported(flags):
    program = (
        "import sys, runpy\n"
        f"sys.argv = ['x', *{[*map(str, flags), '--lr', '0']!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as left:\n"
        "    print('code', left.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment()
    )
    assert done.stdout.strip() == "code 2 False", done.stderr


def test_fault_32_a_bad_line_is_named_with_file_and_line(flags, paths, tmp_path):
    bad = tmp_path / "item2meta_valid.jsonl"
    bad.write_text(paths.val_data.read_text(encoding="utf-8") + "{broken\n", encoding="utf-8")
    outcome = run_here(knowledge_distillation.main, [*flags, "--val_data", bad, "--dry-run"])
    assert outcome.code == 2
    assert f"{bad} line 7 is no JSON" in outcome.last_line


@pytest.mark.slow
def test_fault_34_paths_with_spaces_quotes_and_chinese_characters(flags, tmp_path):
    strange = tmp_path / "数据 集" / "$(touch X)'\"" / "-out"
    options = [*flags, "--num_epochs", 1, "--output_dir", strange]
    outcome = run_here(knowledge_distillation.main, options)
    assert outcome.code == 0, outcome.text
    assert (strange / "vision_lora_adapter_best" / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.rglob("X"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_fault_17_a_validation_that_is_not_finite_is_never_the_best(bad):
    best = Best()
    assert not best.update(bad, 1) and best.epoch == 0
    assert best.update(2.0, 2) and not best.update(bad, 3)
    assert (best.loss, best.epoch) == (2.0, 2)
    again = Best()
    again.load_state_dict(best.state_dict())
    assert not again.update(bad, 4) and not again.update(2.5, 5) and again.update(1.5, 6)


@pytest.mark.parametrize("place", ["below a file", "/proc/no/such"])
def test_fault_15_a_folder_that_no_crawl_can_write_is_one_line(place, tmp_path):
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "data" if place == "below a file" else Path(place)
    items = tmp_path / "item2meta_train.json"
    items.write_text('{"B1": {"images": [{"large": "http://127.0.0.1:9/a.jpg"}]}}')
    flags = ["--data-root", root, "--train-only", "--train-data", items]
    outcome = run_here(crawl_images.main, flags)
    assert outcome.code == 2, outcome.text
    assert outcome.last_line.startswith("error: ") and str(root) in outcome.last_line
    assert "Traceback" not in outcome.text
