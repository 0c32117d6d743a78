"""face_distill's download_weight.py against a Hub on the loopback, with a tiny BLIP-2."""

import os
import re
import signal
import subprocess
import sys
import time

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from face_distill import download_weight
from face_distill.distill import model
from shared import web
from shared.files import write_json
from shared.launch import launch_alone
from shared.web import Patience
from tests import hub_server
from tests.harness import ROOT, free_port, run_here, start, wait_until
from tests.hub_server import COMMIT, REPO_ID, HubServer

SCRIPT = ROOT / "face_distill" / "download_weight.py"
QUICK = Patience(contact=2.0, connect=1.0, silence=0.5, tries=3, pause=0.01, longest_wait=1.5)
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
VISION = {
    "model_type": "blip_2_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.02,
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny BLIP-2 in three shards as on the Hub, with the tower in the first two."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    directory = tmp_path_factory.mktemp("blip2")
    tower = Blip2VisionModel(Blip2VisionConfig(**VISION)).state_dict()
    state = {f"vision_model.{name}": tensor for name, tensor in tower.items()}
    state |= {"query_tokens": torch.zeros(1, 4, 8), "language_model.weight": torch.zeros(99, 99)}
    weight_map = {name: SHARDS[i % 2] for i, name in enumerate(state)}
    weight_map["language_model.weight"] = SHARDS[2]
    for shard in SHARDS:
        part = {name: t.clone() for name, t in state.items() if weight_map[name] == shard}
        save_file(part, directory / shard)
    write_json(directory / INDEX, {"metadata": {}, "weight_map": weight_map})
    write_json(directory / "config.json", {"model_type": "blip-2", "vision_config": VISION})
    write_json(directory / "preprocessor_config.json", {"size": {"height": 28, "width": 28}})
    return directory


@pytest.fixture
def hub(checkpoint):
    """A Hub with that checkpoint and with more that a download has to leave alone."""
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with HubServer(files | {"pytorch_model-00001-of-00002.bin": b"x", "vocab.json": b"{}"}) as hub:
        yield hub


@pytest.fixture
def flags(hub, tmp_path):
    """The flags for that Hub, into an empty directory."""
    return [
        "--endpoint", hub.url, "--repo-id", REPO_ID, "--revision", COMMIT,
        "--blip-path", tmp_path / "weights",
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    hub_server.forget_the_users_settings(monkeypatch)
    monkeypatch.setattr(web, "PATIENCE", QUICK)


def run_script(*args: object) -> tuple[int, list[str], float]:
    """Exit code, lines on stderr and seconds of the script in a process of its own."""
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, SCRIPT, *map(str, args)],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stderr.splitlines(), time.monotonic() - began


def test_what_is_fetched_is_what_the_recipe_loads_and_no_more(hub, flags, checkpoint, tmp_path):
    outcome = run_here(download_weight.main, flags)
    assert outcome.code == 0, outcome.text
    wanted = {"config.json", "preprocessor_config.json", INDEX, *SHARDS[:2]}
    assert hub.fetched() == wanted
    assert {path.name for path in (tmp_path / "weights").iterdir()} == {*wanted, ".download.json"}
    fetched, original = model.load_tower(tmp_path / "weights"), model.load_tower(checkpoint)
    state = original.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in fetched.state_dict().items())
    assert outcome.last_line == f"{tmp_path / 'weights'} holds 5 verified files of {REPO_ID}"


def test_the_same_command_again_fetches_nothing(hub, flags):
    run_here(download_weight.main, flags)
    shard = SHARDS[0]
    hub.heal()
    outcome = run_here(download_weight.main, flags)
    assert outcome.code == 0, outcome.text
    assert hub.fetched() == {INDEX}  # read to know the shards
    assert re.search(rf"there +[\d,]+ bytes  {shard}", outcome.text)


def test_a_dry_run_lists_files_and_bytes_and_fetches_no_weights(hub, flags, tmp_path):
    outcome = run_here(download_weight.main, [*flags, "--dry-run"])
    assert outcome.code == 0, outcome.text
    names = ["config.json", "preprocessor_config.json", INDEX, *SHARDS[:2]]
    for name in names:
        assert re.search(rf"to fetch +{len(hub.files[name]):,} bytes  {name}\n", outcome.text)
    total = sum(len(hub.files[name]) for name in names)
    assert outcome.last_line.startswith(f"{total:,} bytes from {hub.url}")
    assert hub.fetched() == {INDEX}
    assert list(tmp_path.iterdir()) == []


def test_hf_endpoint_names_the_mirror_and_the_flag_wins(hub, flags, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    assert run_here(download_weight.main, [*flags[2:], "--dry-run"]).code == 0
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert run_here(download_weight.main, [*flags, "--dry-run"]).code == 0


def test_the_documented_defaults():
    assert download_weight.Config().blip_path == ROOT / "face_distill" / "blip2_weights"
    assert download_weight.REPO_ID == "Salesforce/blip2-opt-2.7b"
    assert re.fullmatch("[0-9a-f]{40}", download_weight.REVISION)


def test_ctrl_c_ends_with_130_and_the_same_command_continues(hub, flags, tmp_path):
    shard = SHARDS[0]
    half = len(hub.files[shard]) // 2
    hub.misbehave(shard, hub_server.stall(half, 60))
    part = tmp_path / "weights" / f"{shard}.part"
    with start([SCRIPT, *flags]) as running:
        wait_until(lambda: part.exists() and part.stat().st_size > half // 2, "half", 30, running)
        running.signal(signal.SIGINT)
        outcome = running.finish()
    assert outcome.code == 130, outcome.text
    assert outcome.last_line.endswith(
        "interrupted: SIGINT: what came is kept, and the same command continues there (exit 130)"
    )
    size = part.stat().st_size
    hub.heal()
    assert run_here(download_weight.main, flags).code == 0
    assert hub.asked(shard) == [f"bytes={size}-"]


def test_offline_is_honoured_and_said(hub, flags, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    outcome = run_here(download_weight.main, flags)
    assert outcome.code == 2
    assert len(outcome.text.splitlines()) == 1
    assert "HF_HUB_OFFLINE" in outcome.last_line
    assert hub.requests == []


@pytest.mark.full
@pytest.mark.parametrize("how", ["nobody listens", "no answer in time"])
def test_without_a_network_it_ends_within_15_seconds_in_one_line(hub, flags, how):
    hub.misbehave("api", hub_server.hang(60), times=99)
    dead = ["--endpoint", f"http://127.0.0.1:{free_port()}"] if how == "nobody listens" else []
    code, lines, seconds = run_script(*flags, *dead)
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith("error: 127.0.0.1 cannot be reached")
    assert "HF_ENDPOINT=https://hf-mirror.com" in lines[0]
    assert seconds < 15


FAULTS = {
    "cut": (hub_server.cut(1000), 1, True),
    "dropped": (hub_server.drop, 1, True),
    "silent": (hub_server.hang(5), 1, True),
    "stalled": (hub_server.stall(1000, 5), 1, True),
    "slow": (hub_server.slow(4e6), 1, True),
    "busy 429": (hub_server.status(429, retry_after="1"), 1, True),
    "ignores Range": (hub_server.without_range, 9, False),
    "cut for ever": (hub_server.cut(0), 99, True),
    "busy for ever": (hub_server.status(503), 99, True),
    "other content": (hub_server.corrupted, 1, False),
    "404": (hub_server.status(404), 1, True),
    "416": (hub_server.status(416), 1, True),
}
WHOLE = 7  # the first so many end in a whole file, the others in one line


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_in_the_whole_file_or_in_one_line(hub, flags, checkpoint, tmp_path, fault):
    shard = SHARDS[0]
    change, times, late = FAULTS[fault]
    hub.misbehave(shard, change, times, late=late)
    outcome = run_here(download_weight.main, flags)
    there = tmp_path / "weights" / shard
    if list(FAULTS).index(fault) < WHOLE:
        assert outcome.code == 0, outcome.text
        assert there.read_bytes() == hub.files[shard]
    else:
        assert outcome.code in (1, 2), outcome.text
        assert outcome.last_line.startswith("error: ")
        assert "Traceback" not in outcome.text
        assert not there.exists()
        hub.heal()
        assert run_here(download_weight.main, flags).code == 0
        assert there.read_bytes() == hub.files[shard]


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        (["--repo-id", "owner/tinny"], "owner/tinny"),
        (["--revision", "v9"], "revision v9"),
        (["--endpoint", "hf-mirror.com"], "https://hf-mirror.com"),
    ],
)
def test_a_mistake_of_the_user_is_one_line_with_exit_code_2(flags, extra, word):
    outcome = run_here(download_weight.main, [*flags, *extra])
    assert outcome.code == 2
    assert word in outcome.last_line
    assert len(outcome.text.splitlines()) == 1


def test_a_download_needs_no_torch(hub, flags):
    code = (
        "import sys; from face_distill import download_weight\n"
        "assert download_weight.main(sys.argv[1:]) == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, flags)]
    subprocess.run(command, env=environ, check=True, capture_output=True)


def test_one_process_fetches_where_the_shell_asks_for_several(hub, flags, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["download_weight.py", *map(str, flags)])
    assert launch_alone(download_weight.main) == 0
    assert hub.requests == []
