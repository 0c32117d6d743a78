"""Where a run's weights come from: addresses, mmpretrain's own checkpoints; no network."""

import io
import sys
import time
import types

import numpy as np
import pytest
import torch
from torchvision import models

from arcface import evaluate
from arcface.run_scripts import run_arcface
from tests import hub_server
from tests.arcface_nano import build_inshop, write_config
from tests.harness import free_port, run_here
from tests.hub_server import HubServer

# mmengine's, as its checkpoints hold it under message_hub
BUFFER = """
import numpy as np


class HistoryBuffer:
    methods = {}

    def __init__(self):
        self._log_history, self._count_history = np.array([1.5, 2.5]), np.array([1, 1])
        self.methods["mean"] = HistoryBuffer.mean

    def mean(self):
        return 2.0

    def __getstate__(self):
        return self.__dict__ | {"statistics_methods": self.methods}
"""


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    hub_server.forget_the_users_settings(monkeypatch)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(scope="module")
def inshop(tmp_path_factory):
    return build_inshop(tmp_path_factory.mktemp("nano"))


@pytest.fixture
def flags(inshop, tmp_path):
    config = write_config(tmp_path / "nano.py")
    work = ["--work-dir", tmp_path / "work", "--no-validate"]
    return ["--config", config, "--data-root", inshop, *work, "--cfg-options"]


def saved(content):
    written = io.BytesIO()
    torch.save(content, written)
    return written.getvalue()


def test_addresses_are_fetched_into_torchs_cache(flags, tmp_path):
    state = models.resnet18().state_dict()
    with HubServer({"mm.pth": saved({"state_dict": state}), "more.pth": saved(state)}) as server:
        options = [
            "train_cfg.max_epochs=1", f"load_from={server.url}/cdn/more.pth",
            "model.image_encoder.0.init_cfg.type=Pretrained",
            f"model.image_encoder.0.init_cfg.checkpoint={server.url}/cdn/mm.pth",
        ]  # fmt: skip
        outcome = run_here(run_arcface.main, [*flags, *options])
        assert outcome.code == 0, outcome.text
        for name in ("mm.pth", "more.pth"):
            place = tmp_path / "torch" / "hub" / "checkpoints"
            assert (place / name).is_file()
            assert f"fetching {name} (size unknown) from {server.url}/cdn/{name}" in outcome.text


@pytest.mark.parametrize("key", ["load_from", "model.image_encoder.0.init_cfg"])
def test_without_a_network_address_and_place_are_named(key, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)  # between the tries
    url = f"http://127.0.0.1:{free_port()}/resnet18.pth"
    init_cfg = f"{{'type': 'Pretrained', 'checkpoint': '{url}'}}"
    value = url if key == "load_from" else init_cfg
    outcome = run_here(run_arcface.main, [*flags, f"{key}={value}"])
    assert outcome.code == 2
    place = tmp_path / "torch" / "hub" / "checkpoints" / "resnet18.pth"
    assert url in outcome.last_line and str(place) in outcome.last_line


def test_checkpoints_that_mmpretrain_wrote_for_this_recipe_load(flags, inshop, tmp_path):
    modules = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")
    sys.modules.update({name: types.ModuleType(name) for name in modules})
    exec(BUFFER, sys.modules[modules[-1]].__dict__)
    backbone = models.resnet18().state_dict()
    state = {f"image_encoder.0.{n}": t for n, t in backbone.items() if not n.startswith("fc.")}
    centres = torch.randn(4, 512)
    state["head.norm_product.weight"] = centres
    meta = {"epoch": np.int64(3), "iter": 12, "best_score": np.float64(0.9), "seed": np.int32(1)}
    hub = {"log_scalars": {"train/loss": sys.modules[modules[-1]].HistoryBuffer()}}
    path = tmp_path / "best_retrieval_Recall@1_epoch_3.pth"
    path.write_bytes(saved({"meta": meta, "state_dict": state, "message_hub": hub}))
    for name in modules:
        del sys.modules[name]
    options = ["train_cfg.max_epochs=1", f"load_from={path}", "optim_wrapper.optimizer.lr=1e-12"]
    outcome = run_here(run_arcface.main, [*flags, *options])
    assert outcome.code == 0, outcome.text
    trained = torch.load(tmp_path / "work" / "epoch_1.pth")["parts"]
    conv1 = trained["encoder"]["backbone.conv1.weight"]
    assert torch.allclose(conv1, backbone["conv1.weight"], atol=1e-6)
    assert torch.allclose(trained["head"]["weight"], centres, atol=1e-6)
    # no run is beside it: the configuration is typed
    again = ["--checkpoint", path, "--config", tmp_path / "nano.py", "--data-root", inshop]
    evaluated = run_here(evaluate.main, again)
    assert evaluated.code == 0, evaluated.text
    assert (tmp_path / "evaluation" / "retrieval.json").exists()
