"""Settings from flags, files and earlier runs; what every script refuses: test_command_lines.py."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from shared.config import RunOptions, option, parse, parse_known, parse_own
from shared.errors import UserError
from shared.settings import Count, Range, differing, settings


@dataclass(frozen=True)
class Config:
    """Settings of the test."""

    batch_size: Count = option(8, "samples a step (100 % of them)")
    lr: float = option(1e-3, "peak learning rate")
    epochs: int = option(3, "passes", scope="length")
    workers: int = option(0, "loader workers", scope="free")
    name: str = option("plain", "a name", aliases=("--title",))
    mode: Literal["off", "fast"] = option("off", "how", const="fast")
    kind: Literal["first", "last"] | None = option(None, "which")
    shuffle: bool = option(True, "mix the samples")
    data: Path | None = option(None, "directory of the data", scope="free")
    limit: Annotated[int, Range(-1)] | None = option(None, "at most so many samples")
    changes: tuple[str, ...] = option((), "name=value …")
    run: RunOptions = field(default_factory=lambda: RunOptions(log_every=7))


def read(line: str) -> Config:
    return parse(Config, shlex.split(line))


def write(directory: Path, text: str, name: str = "settings.yaml") -> str:
    """The path of a settings file in `directory` with `text` in it."""
    (directory / name).write_text(text, encoding="utf-8")
    return str(directory / name)


def refusal(line: str) -> str:
    """The one line with which `line` is refused."""
    with pytest.raises(UserError) as refused:
        read(line)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# flags


def test_without_flags_come_the_defaults_of_every_level_and_flags_reach_each():
    cfg = read("")
    assert cfg == Config()
    assert (cfg.run.log_every, cfg.run.save_every, cfg.run.processes.nnodes) == (7, 500, 1)
    cfg = read("--save-every 9 --nnodes 2 --title x --nproc_per_node 2")
    assert (cfg.run.save_every, cfg.run.processes.nnodes, cfg.run.log_every) == (9, 2, 7)
    assert (cfg.name, cfg.run.processes.nproc) == ("x", 2)
    assert read("--lr 0.1 --seed 3").run.typed == {"lr", "seed"}


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--kind last", "kind", "last"),
        ("--changes a=1 'b=x y' --lr 0.1 --changes c_d=2", "changes", ("a=1", "b=x y", "c_d=2")),
        ("--name=a_b", "name", "a_b"),
        ("--name a_b", "name", "a_b"),
        ("--shuffle", "shuffle", True),
        ("--no_shuffle", "shuffle", False),
        ("--lr 5e-4", "lr", 0.0005),
        ("--limit -1", "limit", -1),
        ("--mode --epochs 1", "mode", "fast"),
    ],
)
def test_a_flag_becomes_a_value(line: str, name: str, value: Any):
    assert getattr(read(line), name) == value


def test_flags_typed_alone_have_a_meaning_of_their_own():
    cfg = read("--amp --resume --epochs 1")
    assert (cfg.run.amp, cfg.run.resume, cfg.epochs) == ("auto", "auto", 1)
    cfg = read("--mode off --amp bf16 --resume never")
    assert (cfg.mode, cfg.run.amp, cfg.run.resume) == ("off", "bf16", "never")


def test_several_texts_come_from_a_file_and_back_out_of_a_run(tmp_path: Path):
    assert read(f"--config {write(tmp_path, 'changes: [a=1, b=2]')}").changes == ("a=1", "b=2")
    path = write(tmp_path, "changes: a=1\n")
    assert "allowed: a list of texts" in refusal(f"--config {path}")
    stored = {"settings": settings(read("--changes a=1"))}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    (tmp_path / "last.pt").write_text("")
    assert read(f"--resume {tmp_path / 'last.pt'} --epochs 9").changes == ("a=1",)


def test_a_typed_path_is_relative_to_where_it_was_typed(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert read("--data 'sub dir/数据'").data == tmp_path / "sub dir" / "数据"
    assert read("--data ~/faces").data == Path("/home/somebody/faces")
    (tmp_path / "auto").touch()  # which is no checkpoint
    cfg = read("--resume auto")
    assert (cfg.run.resume, cfg.run.is_explicit_resume) == ("auto", False)


def test_the_flags_of_others_are_passed_over_or_given_back_in_their_order():
    @dataclass(frozen=True)
    class Own:
        names: tuple[str, ...] = option((), "names")
        force: bool = option(False, "force")

    words = ["--lr", "1e-4", "--names", "a", "b", "--force", "--model_size", "x"]
    assert parse_known(Own, words) == Own(("a", "b"), True)
    own, rest = parse_own(Own, words)
    assert (own.names, own.force) == (("a", "b"), True)
    assert rest == ["--lr", "1e-4", "--model-size", "x"]


# files


def test_a_file_is_above_the_defaults_and_below_the_flags(tmp_path: Path):
    path = write(tmp_path, "batch_size: 16\nlr: 0.5\nsave-every: 11\n")
    cfg = read(f"--config {path} --lr 0.25")
    assert (cfg.batch_size, cfg.lr, cfg.run.save_every, cfg.epochs) == (16, 0.25, 11, 3)
    assert cfg.run.typed == {"config", "batch_size", "lr", "save_every"}


def test_json_byte_order_marks_and_windows_line_ends_are_read_too(tmp_path: Path):
    text = json.dumps({"batch_size": 2, "data": None, "shuffle": False, "name": "数据"})
    for mark in ("", "\ufeff"):
        cfg = read(f"--config {write(tmp_path, mark + text, 'settings.json')}")
        assert (cfg.batch_size, cfg.data, cfg.shuffle, cfg.name) == (2, None, False, "数据")
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfbatch_size: 2\r\nlr: 5e-4\r\n")
    cfg = read(f"--config {tmp_path}/a.yaml")
    assert (cfg.batch_size, cfg.lr) == (2, 0.0005)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("mode: off", "mode", "off"),  # YAML 1.1 reads off as false
        ("lr: 5e-4", "lr", 0.0005),  # YAML 1.1 reads 5e-4, without a dot, as text
        ("lr: 1", "lr", 1.0),
        ("name: 12", "name", "12"),
        ("limit: null", "limit", None),
        ("kind: null", "kind", None),
        ("shuffle: no", "shuffle", False),
        ("# nothing set", "batch_size", 8),
    ],
)
def test_yaml_values_become_what_was_meant(tmp_path: Path, text: str, name: str, value: Any):
    found = getattr(read(f"--config {write(tmp_path, text)}"), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch-szie: 4", ["unknown setting batch-szie", "did you mean batch_size?"]),
        ("run:\n  seed: 1", ["unknown setting run"]),
        ("batch_size: 2.0", ["batch_size", "a whole number from 1 to", "got 2.0"]),
        ("batch_size: true", ["batch_size", "a whole number from 1 to", "got True"]),
        ("batch_size: null", ["batch_size", "a whole number from 1 to", "got None"]),
        ("shuffle: 1", ["shuffle is 1", "true or false"]),
        ("mode: slow", ["mode is 'slow'", "off, fast"]),
        ("data: 3", ["data is 3", "a path"]),
        ("- 1\n- 2", ["`name: value`", "list"]),
        ("a: [", ["cannot be read"]),
    ],
)
def test_a_file_with_something_wrong_is_refused_by_name(tmp_path: Path, text: str, words):
    message = refusal(f"--config {write(tmp_path, text)}")
    assert all(word in message for word in [*words, "settings.yaml"]), message


def test_a_file_cannot_run_code(tmp_path: Path):
    path = write(tmp_path, f"name: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    assert "cannot be read" in refusal(f"--config {path}")
    assert not (tmp_path / "made").exists()


def test_print_config_prints_what_a_file_takes_and_leaves_with_0(tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as left:
        read("--batch_size 5 --data /x/数据 --amp off --print-config")
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["batch_size"] == 5
    cfg = read(f"--config {write(tmp_path, printed)}")
    assert (cfg.batch_size, cfg.data, cfg.run.log_every) == (5, Path("/x/数据"), 7)


# an explicit --resume PATH


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What a run with batch size 4 and two epochs left behind."""
    directory = tmp_path / "run"
    directory.mkdir()
    cfg = read("--batch-size 4 --epochs 2 --workers 1 --data /data/faces --save-every 3 --dry-run")
    (directory / "config.json").write_text(json.dumps({"settings": settings(cfg)}))
    (directory / "last.pt").touch()
    return directory


def test_a_resumed_run_takes_what_was_not_typed_from_the_run_that_wrote_it(run_dir, monkeypatch):
    monkeypatch.chdir(run_dir.parent)
    for target in (run_dir, run_dir / "last.pt", Path("run/last.pt")):
        cfg = read(f"--resume '{target}'")
        assert (cfg.batch_size, cfg.epochs, cfg.workers, cfg.run.save_every) == (4, 2, 1, 3)
        assert cfg.data == Path("/data/faces")
        assert cfg.run.run_dir == run_dir
        assert cfg.run.resume == str(target.absolute())
        assert cfg.run.is_explicit_resume
        assert not cfg.run.dry_run  # asked for anew each time
    assert read(f"--config {write(run_dir, 'resume: run/last.pt')}").batch_size == 4


def test_a_checkpoint_in_a_folder_of_the_run_directory_belongs_to_that_run(run_dir: Path):
    inside = run_dir / "checkpoints" / "epoch_5.pt"
    inside.parent.mkdir()
    inside.touch()
    cfg = read(f"--resume '{inside}'")
    assert (cfg.batch_size, cfg.run.run_dir, cfg.run.resume) == (4, run_dir, str(inside))
    assert "config.json is missing" in refusal(f"--resume '{inside.parent}'")


def test_a_resumed_demo_keeps_the_settings_it_was_started_with(run_dir: Path):
    demo = {"batch_size": 99, "epochs": 99}
    cfg = parse(Config, ["--demo"], demo=demo)
    assert (cfg.batch_size, cfg.epochs, cfg.run.typed) == (99, 99, {"demo"})
    stored = {"settings": settings(parse(Config, ["--demo", "--epochs", "2"], demo=demo))}
    (run_dir / "config.json").write_text(json.dumps(stored))
    cfg = parse(Config, ["--demo", "--resume", str(run_dir)], demo={"batch_size": 7, "epochs": 7})
    assert (cfg.batch_size, cfg.epochs) == (99, 2)


def test_a_setting_that_a_stored_run_cannot_have_is_refused_with_its_file(run_dir: Path):
    (run_dir / "config.json").write_text(json.dumps({"settings": {"batch_size": "many"}}))
    message = refusal(f"--resume '{run_dir}'")
    assert f"{run_dir}/config.json: batch_size must be a whole number from 1" in message


def test_length_and_free_settings_may_be_given_anew_and_others_are_refused_by_name(run_dir: Path):
    more = "--epochs 9 --workers 0 --log-every 1 --batch-size 4"
    cfg = read(f"--resume '{run_dir}' {more}")
    assert (cfg.epochs, cfg.workers, cfg.run.log_every, cfg.batch_size) == (9, 0, 1, 4)
    message = refusal(f"--resume '{run_dir}' --batch-size 8 --lr 0.5 --epochs 9")
    assert "batch_size: 4 → 8" in message
    assert "lr: 0.001 → 0.5" in message
    assert "epochs" not in message
    assert "--resume never" in message
    path = write(run_dir, "batch_size: 8")
    assert "batch_size: 4 → 8" in refusal(f"--resume '{run_dir}' --config {path}")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"settings": 3}'])
def test_a_checkpoint_without_its_runs_settings_is_refused(tmp_path: Path, content):
    (tmp_path / "last.pt").touch()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert "config.json is missing or was not written by a run" in refusal(f"--resume {tmp_path}")


# what is compared and stored


def test_settings_are_plain_and_can_be_asked_for_by_scope():
    cfg = read("--data /x --epochs 5")
    assert settings(cfg)["data"] == "/x"
    assert json.loads(json.dumps(settings(cfg))) == settings(cfg)
    assert settings(cfg, ("length",)) == {"epochs": 5}
    identity = settings(cfg, ("result",))
    assert {"batch_size", "lr", "seed", "amp", "demo"} <= identity.keys()
    assert not {"workers", "data", "run_dir", "nproc", "resume", "epochs"} & identity.keys()


def test_differences_are_named_old_to_new():
    before: dict[str, Any] = {"a": 1, "b": 2, "gone": 3}
    assert differing(before, {"a": 1, "b": 5, "new": None}) == ["b: 2 → 5", "gone: 3 → None"]
