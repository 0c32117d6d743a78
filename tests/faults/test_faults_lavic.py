"""What users do wrong with lavic's stage 1: one line that says what and what to do, exit code 2.

SIGTERM, kill -9 and exact resumes are in tests/recipes/test_lavic_distillation.py.
"""

import subprocess
import sys

import pytest

from lavic.src import knowledge_distillation
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
    "a batch of nothing": (["--batch_size", 0], "batch_size must be above 0, got 0"),
    "a number that is none": (["--max_samples", "many"], "a number above 0 or all, got many"),
    "no samples": (["--max_samples", 0], "a number above 0 or all, got 0"),
    "an unknown way of slots": (["--slots", "six"], "--slots: invalid choice: 'six'"),
    "dropout of everything": (["--lora_dropout", 1], "lora_dropout must be in [0, 1), got 1.0"),
    "a batch larger than the data": (["--batch_size", 64], "too few for one step"),
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
