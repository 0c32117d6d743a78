"""Pretrained weights in the caches of torch.hub, open_clip and the Hub: fetched once, whole."""

import hashlib

import pytest
from huggingface_hub import hf_hub_download

from shared import hub, web
from shared.hub import NoWeightsError
from shared.web import Patience
from tests import hub_server
from tests.hub_server import COMMIT, REPO_ID, HubServer, move_hub

QUICK = Patience(contact=2.0, connect=1.0, silence=0.5, tries=3, pause=0.01, longest_wait=1.5)
CONTENT = bytes(range(256)) * 400
DIGITS = hashlib.sha256(CONTENT).hexdigest()[:8]
NAME = f"resnet18-{DIGITS}.pth"
FILE = "open_clip_pytorch_model.bin"


@pytest.fixture(autouse=True)
def _neutral(monkeypatch):
    hub_server.forget_the_users_settings(monkeypatch)
    monkeypatch.setattr(web, "PATIENCE", QUICK)


@pytest.fixture
def server(monkeypatch):
    with HubServer({NAME: CONTENT, FILE: CONTENT}, large=(".pth", ".bin")) as hub:
        move_hub(monkeypatch, hub.url)
        yield hub


def test_torchs_weights_are_announced_continued_and_fetched_once(server, tmp_path, caplog):
    server.misbehave(NAME, hub_server.cut(50_000))
    url = f"{server.url}/cdn/{NAME}"
    with caplog.at_level("INFO"):
        path = hub.fetched_weights(url, tmp_path / "checkpoints")
        assert hub.fetched_weights(url, tmp_path / "checkpoints") == path
    assert path == tmp_path / "checkpoints" / NAME and path.read_bytes() == CONTENT
    assert server.asked(NAME) == [None, "bytes=50000-"]
    said = f"fetching {NAME} (size unknown) from {url} into {path.parent}"
    assert caplog.messages[0] == said


def test_weights_that_are_not_what_their_name_says_are_refused(server, tmp_path):
    server.misbehave(NAME, hub_server.corrupted, late=False)
    with pytest.raises(NoWeightsError, match="with a wrong checksum"):
        hub.fetched_weights(f"{server.url}/cdn/{NAME}", tmp_path)
    assert not (tmp_path / NAME).exists()


def test_weights_are_found_by_the_hubs_own_client_afterwards(server, tmp_path):
    path = hub.clip_weights({"hf_hub": f"{REPO_ID}/"}, tmp_path)
    assert path.read_bytes() == CONTENT
    found = hf_hub_download(REPO_ID, FILE, cache_dir=tmp_path, local_files_only=True)
    assert found == str(path) and COMMIT in found
    server.heal()
    assert hub.clip_weights({"hf_hub": f"{REPO_ID}/{FILE}"}, tmp_path) == path
    assert server.requests == []


def test_an_address_of_open_clips_table_serves_where_there_is_no_repository(server, tmp_path):
    path = hub.clip_weights({"url": f"{server.url}/cdn/{NAME}"}, tmp_path)
    assert path == tmp_path / NAME
