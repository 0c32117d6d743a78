"""ModelScope as a source of files: listed, fetched, continued, checked."""

import json

import pytest

from face_distill import download_weight
from shared import hub, web
from shared.errors import UserError
from shared.tools import fetch_model
from shared.web import DownloadError, Patience
from tests import hub_server
from tests.harness import free_port, run_here
from tests.hub_server import REPO_ID
from tests.modelscope_server import ModelScopeServer

QUICK = Patience(contact=2.0, connect=1.0, silence=0.5, tries=3, pause=0.01, longest_wait=1.5)
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
FILES = {
    "config.json": b'{"model_type": "blip-2"}',
    "preprocessor_config.json": b"{}",
    INDEX: json.dumps(
        {"weight_map": {"vision_model.a": SHARDS[0], "language_model.b": SHARDS[1]}}
    ).encode(),
    SHARDS[0]: bytes(range(256)) * 200,
    SHARDS[1]: b"the language model",
    "folder/with space & signs.txt": b"text",
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    hub_server.forget_the_users_settings(monkeypatch)
    monkeypatch.setattr(web, "PATIENCE", QUICK)
    for name in ("MODELSCOPE_DOMAIN", "MODELSCOPE_ENDPOINT", "USE_MODELSCOPE_HUB"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with ModelScopeServer(FILES) as server:
        yield server


def open_it(server, revision="master"):
    return hub.open_modelscope(REPO_ID, revision, endpoint=server.url)


def test_files_are_listed_and_fetched_whole(server, tmp_path):
    repository = open_it(server)
    assert repository.files.keys() == FILES.keys()
    repository.fetch(repository.plan(FILES, tmp_path))
    assert all((tmp_path / name).read_bytes() == content for name, content in FILES.items())


def test_an_unknown_revision_names_host_and_way_out(server):
    with pytest.raises(UserError, match=r"is not at 127\.0\.0\.1 \(404\).*names there differ"):
        open_it(server, "v9")


@pytest.mark.parametrize(
    "body", [b"<html>login</html>", b"[]", b'{"Data": {"Files": [{"Path": "a"}]}}', b"[" * 99_999]
)
def test_another_answer_than_modelscopes_is_named(server, body):
    def change(answer):
        answer.body, answer.headers = body, {}

    server.misbehave("api", change, times=9)
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1 did not answer as ModelScope does"):
        open_it(server)


def test_a_host_that_cannot_be_reached_is_named():
    endpoint = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1 cannot be reached.*Hugging Face Hub"):
        hub.open_modelscope(REPO_ID, "master", endpoint=endpoint)


@pytest.mark.parametrize("repo_id", ["", "owner", "a/b/c", "/b", "a/\n", "../b"])
def test_what_is_no_repository_is_refused_and_leads_out_of_no_cache(repo_id, tmp_path):
    with pytest.raises(UserError, match="no owner/name"):
        hub.open_modelscope(repo_id, "master", endpoint="http://127.0.0.1:1")
    with pytest.raises(UserError, match="no owner/name"):
        hub.local_copy(repo_id, {"MODELSCOPE_CACHE": str(tmp_path / "cache")})
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("environ", "endpoint"),
    [
        ({}, "https://www.modelscope.cn"),
        ({"MODELSCOPE_DOMAIN": "mirror.example"}, "https://mirror.example"),
        ({"MODELSCOPE_DOMAIN": "http://mirror.example"}, "http://mirror.example"),
        (
            {"MODELSCOPE_ENDPOINT": "https://a.example", "MODELSCOPE_DOMAIN": "b"},
            "https://a.example",
        ),
    ],
)
def test_the_address_is_the_one_modelscopes_own_programs_take(environ, endpoint):
    assert hub.modelscope_endpoint(environ) == endpoint


@pytest.mark.parametrize("how", ["source", "flag", "variable"])
def test_download_weight_takes_modelscope_by_flag_and_by_variable(
    server, tmp_path, monkeypatch, how
):
    words = ["--repo-id", REPO_ID, "--blip-path", tmp_path]
    if how != "variable":
        flag = ["--modelscope"] if how == "flag" else ["--source", "modelscope"]
        words += [*flag, "--endpoint", server.url]
    else:
        monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
        monkeypatch.setenv("MODELSCOPE_DOMAIN", server.url)
    ended = run_here(download_weight.main, words)
    assert ended.code == 0, ended.text
    assert (tmp_path / SHARDS[0]).read_bytes() == FILES[SHARDS[0]]
    assert not (tmp_path / SHARDS[1]).exists()
    assert "holds 4 verified files" in ended.text
    assert not any("authorization" in request.headers for request in server.requests)


WHOLE = set(FILES) | {"tokenizer.json"}
PICKLED = {"pytorch_model.bin": b"the same again", "tf_model.h5": b"and again"}


@pytest.fixture
def model_server():
    with ModelScopeServer({**FILES, **PICKLED, "tokenizer.json": b"{}"}) as server:
        yield server


def test_a_model_is_fetched_in_one_form_by_the_tool(model_server, tmp_path):
    words = [REPO_ID, tmp_path, "--source", "modelscope", "--endpoint", model_server.url]
    shown = run_here(fetch_model.main, [*words, "--dry-run"])
    assert shown.code == 0 and "pytorch_model.bin" not in shown.text, shown.text
    assert not (tmp_path / "config.json").exists()
    ended = run_here(fetch_model.main, words)
    assert ended.code == 0, ended.text
    assert f"{tmp_path} holds {len(WHOLE)} verified files of {REPO_ID}" in ended.text
    assert all((tmp_path / name).is_file() for name in WHOLE)
    assert not any((tmp_path / name).exists() for name in PICKLED)


def test_the_tool_takes_the_hub_too(tmp_path):
    with hub_server.HubServer({"config.json": b"{}", "pytorch_model.bin": b"weights"}) as there:
        ended = run_here(fetch_model.main, [REPO_ID, tmp_path, "--endpoint", there.url])
    assert ended.code == 0, ended.text
    assert (tmp_path / "pytorch_model.bin").read_bytes() == b"weights"  # in its only form


def local_copy(url, cache):
    environ = {"MODELSCOPE_CACHE": str(cache), "MODELSCOPE_ENDPOINT": url}
    return hub.local_copy(REPO_ID, environ)


def test_a_local_copy_is_fetched_once_and_serves_while_nobody_answers(model_server, tmp_path):
    place = local_copy(model_server.url, tmp_path)
    assert place == tmp_path / "models" / REPO_ID
    assert all((place / name).is_file() for name in WHOLE)
    local_copy(model_server.url, tmp_path)
    assert len(model_server.of("config.json")) == 1
    assert local_copy(f"http://127.0.0.1:{free_port()}", tmp_path) == place


def test_a_local_copy_that_is_not_whole_does_not_serve(model_server, tmp_path):
    model_server.misbehave(SHARDS[0], lambda answer: setattr(answer, "status", 403))
    with pytest.raises(UserError, match=SHARDS[0]):
        local_copy(model_server.url, tmp_path)
    with pytest.raises(DownloadError, match="cannot be reached"):
        local_copy(f"http://127.0.0.1:{free_port()}", tmp_path)


@pytest.mark.parametrize(
    ("source", "variable", "wanted"),
    [("auto", "1", True), ("auto", "", False), ("hub", "1", False), ("modelscope", "", True)],
)
def test_the_flag_decides_before_the_variable(source, variable, wanted):
    assert hub.is_wanted(source, {"USE_MODELSCOPE_HUB": variable}) == wanted
