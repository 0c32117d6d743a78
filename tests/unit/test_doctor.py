"""doctor.py: what is there, what is not, and the command that brings it."""

import contextlib
import http.server
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shared.tools import about, doctor, doctor_checks
from shared.tools.doctor_checks import Check

ROOT = Path(__file__).resolve().parents[2]
RECIPES = about.read_all()
FACES = RECIPES["face_distill"]
TORCH_HOME = "TORCH_HOME"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in which face_distill alone stands, with nothing in it."""
    root = tmp_path / "the repository"
    (root / "face_distill").mkdir(parents=True)
    shutil.copy(ROOT / "face_distill" / "about.json", root / "face_distill")
    (root / "requirements").mkdir()
    (root / "requirements" / "lock.txt").write_text("numpy==9.9.9\npytest==1.0\n")
    (root / "requirements" / "face_distill.txt").write_text("-c lock.txt\n-r base.txt\npytest>=1\n")
    (root / "requirements" / "base.txt").write_text("numpy>=1.0  # arrays\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (TORCH_HOME, "XDG_CACHE_HOME", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    return root


def put(root: Path, path: str, content: bytes = b"something") -> None:
    place = root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)


def checks_of(root: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Check]:
    doctor.main(["--json", *words], root)
    answer = json.loads(capsys.readouterr().out)
    return {check["name"]: Check(**check) for check in answer["checks"]}


def test_it_says_first_what_the_demos_need_and_then_what_real_data_need(root, capsys):
    assert doctor.main(["face_distill"], root) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "demos need nothing more: ./demo.sh face_distill"
    data = lines.index("real data need 4 more")
    assert lines.index("packages") < lines.index("machine") < data < lines.index("network")
    tower = lines.index(
        "MISSING BLIP-2's vision tower, 10 GB: face_distill/blip2_weights/*.safetensors"
    )
    assert data < tower and lines[tower + 1].strip() == "python face_distill/download_weight.py"
    (root / "requirements" / "base.txt").write_text("no-such-package-here>=1\n")
    assert doctor.main(["face_distill"], root) == 1
    assert capsys.readouterr().out.startswith("demos need 1 more\n")


def test_exit_0_when_all_is_there(root, capsys):
    for need in (*FACES.weights, *FACES.data):
        put(root, need.path)
    assert doctor.main(["face_distill"], root) == 0
    assert "\nreal data need nothing more\n" in capsys.readouterr().out


def test_an_optional_file_is_a_note(root, capsys):
    for need in (*FACES.weights, *FACES.data):
        if not need.optional:
            put(root, need.path)
    assert doctor.main([], root) == 0
    assert "note  pairs to verify" in capsys.readouterr().out


def test_the_programs_of_a_recipe_are_looked_for(root, capsys, monkeypatch):
    (root / "multimodal").mkdir()
    shutil.copy(ROOT / "multimodal" / "about.json", root / "multimodal")
    bin_ = root / "bin"
    put(root, "bin/yt-dlp")
    put(root, "bin/bsdtar")
    for name in ("yt-dlp", "bsdtar"):
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_))
    found = checks_of(root, capsys, "multimodal")
    states = {name.partition(",")[0]: check for name, check in found.items()}
    assert [states[name].state for name in ("yt-dlp", "ffmpeg", "7z")] == ["ok", "note", "ok"]
    assert states["7z"].value in ("bsdtar", "py7zr")
    assert "install it" in states["ffmpeg"].advice


def test_it_fits_80_columns_without_colour_in_a_pipe():
    text = run(HF_ENDPOINT="https://" + "a-long-name." * 12).stdout
    assert "real data of arcface" in text and "\x1b" not in text
    assert not [line for line in text.splitlines() if len(line) > 80 and " " in line.strip()]


def test_a_command_on_several_lines_can_be_copied():
    text = run("vasevqa").stdout
    words = next(need.command for need in RECIPES["vasevqa"].weights if "Qwen" in need.what)
    lines = text[text.index("python shared/tools/fetch_model.py Qwen") :].splitlines()
    assert lines[0].endswith(" \\") and not lines[1].endswith("\\")
    said = subprocess.check_output(
        ["bash", "-c", "printf '%s\\n' " + "\n".join(lines[:2])], text=True
    )
    assert said.split() == shlex.split(words)


@pytest.mark.parametrize(("no_color", "is_coloured"), [("", True), ("1", False)])
def test_states_are_coloured_on_a_terminal(no_color, is_coloured):
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "shared" / "tools" / "doctor.py"), "arcface"]
    environ = os.environ | {"NO_COLOR": no_color, "TERM": "xterm"}
    with subprocess.Popen(command, stdout=theirs, env=environ) as process:
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):  # EIO: the writer has left
            while chunk := os.read(ours, 65536):
                text += chunk
        process.wait()
    os.close(ours)
    assert (b"\x1b[32m  ok   \x1b[0m" in text) == (b"\x1b" in text) == is_coloured


def test_another_place_will_do(root, capsys):
    put(root, "face_distill/datasets/faces_emore/anna/1.jpg")
    check = checks_of(root, capsys)["faces_emore (MS1M-ArcFace), or <identity>/<image> folders"]
    assert (check.state, check.value) == ("ok", "face_distill/datasets/faces_emore/anna/1.jpg")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid"])
def test_an_empty_file_and_a_pointer_are_not_there(root, capsys, content):
    put(root, "face_distill/teacher_features_12k/teacher_embedding.npy", content)
    assert checks_of(root, capsys)["the teacher's embeddings"].state == "missing"


def test_an_unfinished_download_is_named(root, capsys):
    put(root, "face_distill/blip2_weights/model-00001.safetensors.part")
    check = checks_of(root, capsys)["BLIP-2's vision tower, 10 GB"]
    assert check.state == "missing" and "unfinished" in check.value


def test_packages_are_held_against_floors_and_the_lock(root, capsys):
    found = checks_of(root, capsys)
    assert found["pytest"].state == found["numpy"].state == "note"
    assert found["numpy"].value.endswith("tested with 9.9.9")
    (root / "requirements" / "base.txt").write_text("numpy>=99.1\nno-such-package-here>=1\n")
    found = checks_of(root, capsys)
    assert found["numpy"].state == "missing" and found["numpy"].value.endswith("needs >=99.1")
    assert found["no-such-package-here"].value == "not installed"
    assert found["no-such-package-here"].command == "./setup.sh"


@pytest.mark.parametrize(
    ("version", "conditions", "holds"),
    [
        ("2.15.0+cu132", ">=2.10", True),
        ("2.9.1", ">=2.10", False),
        ("3.3.0", ">=3.3,<4", True),
        ("4.0", ">=3.3,<4", False),
        ("1.2.3", "==1.2", True),
        ("1.3", "==1.2", False),
        ("1.0", "", True),
    ],
)
def test_versions_compare_by_numbers(version, conditions, holds):
    assert doctor_checks._satisfies(version, conditions) is holds


def test_an_unknown_recipe_is_exit_2_with_the_nearest_name(root, capsys):
    assert doctor.main(["face_distil"], root) == 2
    assert "did you mean face_distill?" in capsys.readouterr().err


def test_credentials_of_addresses_are_not_shown(root, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://me:s3cret@mirror.example/hub/?key=s3cret")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:s3cret@proxy.example:3128")
    assert doctor.main([], root) == 1
    text = capsys.readouterr().out
    assert "https://mirror.example/hub" in text and "http://proxy.example:3128" in text
    assert "s3cret" not in text


@contextlib.contextmanager
def server(status: int):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def test_hosts_are_asked_only_with_online(root, capsys, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "localhost:1")  # nobody listens there
    with server(405) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        asked = checks_of(root, capsys, "--online")
        unasked = checks_of(root, capsys)
    assert asked["Hugging Face Hub"].value == f"{address} answers (405)"
    assert asked["ModelScope"].state == "note"
    assert "https://localhost:1 does not answer" in asked["ModelScope"].value
    assert "--online" in unasked["Hugging Face Hub"].value


@pytest.mark.parametrize(
    ("environ", "shown"),
    [
        ({}, "https://www.modelscope.cn"),
        ({"MODELSCOPE_DOMAIN": "mirror.example"}, "https://mirror.example"),
        (
            {"MODELSCOPE_ENDPOINT": "https://me:s3cret@a.example", "MODELSCOPE_DOMAIN": "b"},
            "https://a.example",
        ),
    ],
)
def test_modelscope_is_where_its_variables_say(root, capsys, monkeypatch, environ, shown):
    for name in ("MODELSCOPE_DOMAIN", "MODELSCOPE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert checks_of(root, capsys)["ModelScope"].value == f"{shown} (asked with --online)"


def test_a_mirror_that_does_not_answer_is_not_the_advice(root, capsys, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://localhost:1")  # nobody listens there
    monkeypatch.setenv("HF_ENDPOINT", "https://hf-mirror.com")
    advice = checks_of(root, capsys, "--online")["Hugging Face Hub"].advice
    assert advice == "check the proxy; or set another HF_ENDPOINT, as https://huggingface.co"


def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "shared" / "tools" / "doctor.py"), *words]
    changed = os.environ | environ
    return subprocess.run(command, capture_output=True, text=True, env=changed, check=False)


def fake_torchaudio(tmp_path: Path, program: str) -> str:
    info = tmp_path / "torchaudio-2.5.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchaudio\nVersion: 2.5.0\n")
    (tmp_path / "torchaudio.py").write_text(program)
    return str(tmp_path)


def test_a_broken_torchaudio_is_named(tmp_path):
    path = fake_torchaudio(tmp_path, "raise OSError('undefined symbol: _ZN3c10')")
    text = run("face_distill", PYTHONPATH=path).stdout
    assert "MISSING torchaudio: 2.5.0 is broken: OSError: undefined symbol: _ZN3c10" in text
    assert text.startswith("demos need 1 more")
    assert "pip uninstall torchaudio" in text


def test_a_whole_torchaudio_is_no_fault(tmp_path):
    text = run("face_distill", "--json", PYTHONPATH=fake_torchaudio(tmp_path, "")).stdout
    found = {check["name"]: check for check in json.loads(text)["checks"]}
    assert found["torchaudio"]["state"] == "ok" and "2.5.0" in found["torchaudio"]["value"]


def test_the_answer_comes_without_torch_and_at_once():
    began = time.perf_counter()
    program = (
        "import sys; from shared.tools import doctor; doctor.main([]);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
    assert time.perf_counter() - began < 6  # measured: 0.1 s


def needs_of(recipe: about.Recipe) -> tuple[about.Need, ...]:
    return (*recipe.weights, *recipe.data, *recipe.programs)


def test_every_recipe_says_what_it_needs_and_names_scripts_that_are_there():
    recipes = {path.stem for path in (ROOT / "requirements").glob("*.txt")}
    assert recipes - {"base", "dev", "lock"} == RECIPES.keys()
    for name, recipe in RECIPES.items():
        assert (ROOT / name / "README.md").is_file()
        assert (ROOT / name / recipe.demo_command.split()[0]).is_file()
        for need in needs_of(recipe):
            for script in re.findall(r"\bpython (\S+\.py)", need.command):
                assert (ROOT / script).is_file(), need


def test_every_need_says_what_brings_it_and_commands_are_shell():
    for need in (need for recipe in RECIPES.values() for need in needs_of(recipe)):
        assert need.what and (need.command or need.hint) and bool(need.path) != bool(need.name)
        assert not need.path.startswith("/")
        assert not need.command or shlex.split(need.command)
