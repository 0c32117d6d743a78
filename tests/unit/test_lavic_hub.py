"""A base model of the Hub: there, refused, out of reach, or in the cache while nobody answers."""

import logging
import shutil
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import constants

from lavic.src.vision.model import hub_answers, load_base
from shared import web
from shared.errors import UserError
from shared.web import Patience
from tests import hub_server
from tests.harness import ROOT, environment
from tests.hub_server import COMMIT, REPO_ID, HubServer, move_hub
from tests.lavic_nano import build_nano, flags_of
from tests.modelscope_server import ModelScopeServer

CPU = torch.device("cpu")
NOBODY = "http://127.0.0.1:9"  # the port of a service that is nowhere
QUICK = Patience(contact=1.0, connect=0.5, silence=0.5, pause=0.01)


def listings(server):
    """The requests for the model's files; the client asks for more by itself."""
    return [request for request in server.requests if "/api/models/" in request.path]


@pytest.fixture(autouse=True)
def _neutral(monkeypatch, tmp_path):
    hub_server.forget_the_users_settings(monkeypatch)
    monkeypatch.setattr(web, "PATIENCE", QUICK)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    move_hub(monkeypatch, NOBODY)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("nano"))


def cached(tmp_path, source):
    """`source` in the cache, as the Hub's client lays it out."""
    place = tmp_path / "cache" / f"models--{REPO_ID.replace('/', '--')}"
    shutil.copytree(source, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)


def test_a_model_that_the_hub_gives_is_announced_with_host_and_cache(monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.INFO, "lavic")
    with HubServer({"config.json": b"{}"}) as server:
        move_hub(monkeypatch, server.url)
        assert hub_answers(REPO_ID)
        assert f"{REPO_ID} is fetched from {server.url} into {tmp_path / 'cache'}" in caplog.text
        assert len(listings(server)) == 1


def test_a_model_that_the_hub_does_not_have_is_refused_by_name_and_host(monkeypatch):
    with HubServer({"config.json": b"{}"}) as server:
        move_hub(monkeypatch, server.url)
        with pytest.raises(UserError, match=r"nobody/none at .* is not at 127\.0\.0\.1 \(404\)"):
            hub_answers("nobody/none")


@pytest.mark.parametrize("name", ["/nowhere/model", "models/none/x", "./here", "a b/c"])
def test_a_path_that_leads_nowhere_is_no_id_of_the_hub(name):
    with pytest.raises(UserError, match="is no directory here, and no id of the Hub"):
        load_base(name, CPU, torch.float32)


def test_a_busy_hub_is_asked_again(monkeypatch):
    with HubServer({"config.json": b"{}"}) as server:
        server.misbehave("api", hub_server.status(503), times=1)
        move_hub(monkeypatch, server.url)
        assert hub_answers(REPO_ID)
        assert len(listings(server)) == 2


def test_what_is_in_the_cache_is_loaded_while_nobody_answers(caplog, paths, tmp_path):
    caplog.set_level(logging.INFO, "lavic")
    cached(tmp_path, paths.weights)
    began = time.monotonic()
    model, processor = load_base(REPO_ID, CPU, torch.float32)
    assert time.monotonic() - began < 30  # three tries; transformers alone: a minute a file
    assert f"{REPO_ID} is taken from the cache: 127.0.0.1 cannot be reached" in caplog.text
    known, same = load_base(paths.weights, CPU, torch.float32)
    for ours, theirs in zip(model.parameters(), known.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert processor.tokenizer.get_vocab() == same.tokenizer.get_vocab()


@pytest.mark.slow
def test_fault_48_without_a_network_a_model_is_refused_in_one_line_with_its_host(paths, tmp_path):
    script = ROOT / "lavic" / "src" / "knowledge_distillation.py"
    words = [*flags_of(paths, tmp_path / "out"), "--model_name", "nobody/none"]
    places = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://nobody.invalid"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, script, *map(str, words)],
        capture_output=True, text=True, timeout=60, env=environment(HF_HUB_OFFLINE="0", **places),
    )  # fmt: skip
    assert time.monotonic() - began < 30  # on a machine that is at work; 15 at most on a quiet one
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: nobody/none is no directory here and not in the cache ")
    assert "nobody.invalid cannot be reached" in last and "HF_ENDPOINT=https://" in last
    assert "Traceback" not in done.stderr


def test_modelscope_serves_where_it_is_asked_for(paths, tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in paths.weights.iterdir() if path.is_file()}
    with ModelScopeServer(files) as server:
        monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
        model, processor = load_base(REPO_ID, CPU, torch.float32)
    local, _ = load_base(paths.weights, CPU, torch.float32)
    theirs = local.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    assert processor.tokenizer.get_vocab()
    assert model.name_or_path == REPO_ID  # what an adapter notes; a cache's path is nobody else's
