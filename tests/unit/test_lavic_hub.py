"""A base model of the Hub: there, refused, out of reach, or in the cache while nobody answers."""

import logging
import shutil
import time

import pytest
import torch
from huggingface_hub import constants

from lavic.src import knowledge_distillation
from lavic.src.vision.model import hub_answers, load_base
from shared import web
from shared.errors import UserError
from shared.web import Patience
from tests import hub_server
from tests.harness import run_here
from tests.hub_server import COMMIT, REPO_ID, HubServer, move_hub
from tests.lavic_nano import build_nano, flags_of
from tests.lavic_talks import nano
from tests.modelscope_server import ModelScopeServer

CPU = torch.device("cpu")
NOBODY = "http://127.0.0.1:9"  # the port of a service that is nowhere
QUICK = Patience(contact=1.0, connect=0.5, silence=0.5, pause=0.01)


@pytest.fixture(autouse=True)
def _neutral(monkeypatch, tmp_path):
    hub_server.forget_the_users_settings(monkeypatch)
    monkeypatch.setattr(web, "PATIENCE", QUICK)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    move_hub(monkeypatch, NOBODY)


def assert_is_nanos(model, processor):
    known, same = load_base(nano().model, CPU, torch.float32)
    for ours, theirs in zip(model.parameters(), known.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert processor.tokenizer.get_vocab() == same.tokenizer.get_vocab()


def test_a_model_that_the_hub_gives_is_announced_with_host_and_cache(monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.INFO, "lavic")
    with HubServer({"config.json": b"{}"}) as server:
        server.misbehave("api", hub_server.status(503), times=1)  # it is busy, and asked again
        move_hub(monkeypatch, server.url)
        assert hub_answers(REPO_ID)
        assert f"{REPO_ID} is fetched from {server.url} into {tmp_path / 'cache'}" in caplog.text
        assert sum("/api/models/" in request.path for request in server.requests) == 2


def test_what_is_neither_a_directory_nor_an_id_is_refused():
    with pytest.raises(UserError, match="is no directory here, and no id of the Hub"):
        load_base("a b/c", CPU, torch.float32)


def test_what_is_in_the_cache_is_loaded_while_nobody_answers(caplog, tmp_path):
    caplog.set_level(logging.INFO, "lavic")
    place = tmp_path / "cache" / f"models--{REPO_ID.replace('/', '--')}"
    shutil.copytree(nano().model, place / "snapshots" / COMMIT)  # as the Hub's client lays it out
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    began = time.monotonic()
    found = load_base(REPO_ID, CPU, torch.float32)
    assert time.monotonic() - began < 30  # three tries; transformers alone: a minute a file
    assert f"{REPO_ID} is taken from the cache: 127.0.0.1 cannot be reached" in caplog.text
    assert_is_nanos(*found)


def test_fault_48_without_a_network_a_model_is_refused_in_one_line_with_its_host(
    tmp_path, monkeypatch
):
    """That the patience which is not patched here fits into 15 s: tests/unit/test_download.py."""
    move_hub(monkeypatch, "http://nobody.invalid")
    words = flags_of(build_nano(tmp_path / "nano"), tmp_path / "out")
    outcome = run_here(knowledge_distillation.main, [*words, "--model_name", "nobody/none"])
    assert outcome.code == 2 and "Traceback" not in outcome.text
    last = outcome.last_line
    assert last.startswith("error: nobody/none is no directory here and not in the cache ")
    assert "nobody.invalid cannot be reached" in last and "HF_ENDPOINT=https://" in last


def test_modelscope_serves_where_it_is_asked_for(tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in nano().model.iterdir() if path.is_file()}
    with ModelScopeServer(files) as server:
        monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
        model, processor = load_base(REPO_ID, CPU, torch.float32)
    assert_is_nanos(model, processor)
    assert model.name_or_path == REPO_ID  # what an adapter notes; a cache's path is nobody else's
