"""doctor.py: what is there, what is not, and the command that brings it."""

import contextlib
import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
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


def test_without_what_is_optional_it_is_exit_0_and_a_note(root, capsys):
    for need in (*FACES.weights, *FACES.data):
        if not need.optional:
            put(root, need.path)
    assert doctor.main([], root) == 0
    text = capsys.readouterr().out
    assert "\nreal data need nothing more\n" in text
    assert "note  pairs to verify" in text


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


def test_it_fits_80_columns_without_colour_in_a_pipe(capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://" + "a-long-name." * 12)
    doctor.main([])
    text = capsys.readouterr().out
    assert "real data of arcface" in text and "\x1b" not in text
    assert not [line for line in text.splitlines() if len(line) > 80 and " " in line.strip()]


def test_a_command_on_several_lines_can_be_copied(capsys):
    doctor.main(["vasevqa"])
    text = capsys.readouterr().out
    words = next(need.command for need in RECIPES["vasevqa"].weights if "Qwen" in need.what)
    lines = text[text.index("python shared/tools/fetch_model.py Qwen") :].splitlines()
    assert lines[0].endswith(" \\") and not lines[1].endswith("\\")
    said = subprocess.check_output(
        ["bash", "-c", "printf '%s\\n' " + "\n".join(lines[:2])], text=True
    )
    assert said.split() == shlex.split(words)


EMBEDDINGS, TOWER = "the teacher's embeddings", "BLIP-2's vision tower, 10 GB"


@pytest.mark.parametrize(
    ("path", "content", "name", "state", "said"),
    [
        (
            "datasets/faces_emore/anna/1.jpg", b"a face",
            "faces_emore (MS1M-ArcFace), or <identity>/<image> folders", "ok", "faces_emore/anna/1",
        ),
        ("teacher_features_12k/teacher_embedding.npy", b"", EMBEDDINGS, "missing", ".npy"),
        (
            "teacher_features_12k/teacher_embedding.npy", b"version https://git-lfs.github.com/",
            EMBEDDINGS, "missing", ".npy",
        ),
        ("blip2_weights/model-1.safetensors.part", b"half", TOWER, "missing", "unfinished"),
    ],
    ids=["another place", "empty", "pointer", "unfinished"],
)  # fmt: skip
def test_a_file_is_there_or_not(root, capsys, path, content, name, state, said):
    put(root, f"face_distill/{path}", content)
    check = checks_of(root, capsys)[name]
    assert check.state == state and said in check.value


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
        ("2.10.0", ">=2.10.0", True),
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
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "https://me:s3cret@a.example")
    value = checks_of(root, capsys)["ModelScope"].value
    assert value == "https://a.example (asked with --online)"
    assert asked["Hugging Face Hub"].value == f"{address} answers (405)"
    assert asked["ModelScope"].state == "note"
    assert "https://localhost:1 does not answer" in asked["ModelScope"].value
    assert "--online" in unasked["Hugging Face Hub"].value


def test_a_mirror_that_does_not_answer_is_not_the_advice(root, capsys, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://localhost:1")  # nobody listens there
    monkeypatch.setenv("HF_ENDPOINT", "https://hf-mirror.com")
    advice = checks_of(root, capsys, "--online")["Hugging Face Hub"].advice
    assert advice == "check the proxy; or set another HF_ENDPOINT, as https://huggingface.co"


def run(*words: str, **environ: str) -> str:
    command = [sys.executable, str(ROOT / "shared" / "tools" / "doctor.py"), *words]
    changed = os.environ | environ
    return subprocess.run(command, capture_output=True, text=True, env=changed, check=False).stdout


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (
            "raise OSError('undefined symbol: _ZN3c10')",
            "MISSING torchaudio: 2.5.0 is broken: OSError: undefined symbol: _ZN3c10",
        ),
        ("", "demos need nothing more"),
    ],
)
def test_a_torchaudio_is_a_fault_where_it_is_broken(tmp_path, program, said):
    info = tmp_path / "torchaudio-2.5.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchaudio\nVersion: 2.5.0\n")
    (tmp_path / "torchaudio.py").write_text(program)
    text = run("face_distill", PYTHONPATH=str(tmp_path))
    assert said in text
    assert ("pip uninstall torchaudio" in text) == bool(program)


def test_states_have_colours_and_torch_is_not_imported_for_it(root):
    program = (
        "import pathlib, sys; from shared import terminal; from shared.tools import doctor;"
        "terminal.coloured = lambda text, colour: f'<{colour}>{text}';"
        "doctor.main([], pathlib.Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    text = subprocess.check_output([sys.executable, "-c", program, root], cwd=ROOT, text=True)
    for sign in ("<green>  ok    python", "<yellow>  note  numpy", "<red>MISSING BLIP-2"):
        assert sign in text


def needs_of(recipe: about.Recipe) -> tuple[about.Need, ...]:
    return (*recipe.weights, *recipe.data, *recipe.programs)


def test_every_recipe_says_what_it_needs_and_names_scripts_that_are_there():
    recipes = {path.stem for path in (ROOT / "requirements").glob("*.txt")}
    assert recipes - {"base", "dev", "lock"} == RECIPES.keys()
    for name, recipe in RECIPES.items():
        assert (ROOT / name / "README.md").is_file()
        assert (ROOT / name / recipe.demo_command.split()[0]).is_file()
        for need in needs_of(recipe):
            assert need.what and (need.command or need.hint) and bool(need.path) != bool(need.name)
            assert not need.path.startswith("/")
            for script in re.findall(r"\bpython (\S+\.py)", need.command):
                assert (ROOT / script).is_file(), need
