import json
import shlex
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from shared.config import RunOptions, ToolOptions, option, parse, parse_known, parse_own
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


def test_without_flags_come_the_defaults_of_every_level() -> None:
    cfg = read("")
    assert cfg == Config()
    assert (cfg.run.log_every, cfg.run.save_every, cfg.run.processes.nnodes) == (7, 500, 1)


def test_a_choice_may_be_left_open(tmp_path: Path) -> None:
    assert read("").kind is None
    assert read("--kind last").kind == "last"
    assert "kind is 'middle', allowed: first, last" in refusal("--kind middle")
    assert read(f"--config {write(tmp_path, 'kind: first')}").kind == "first"
    assert read(f"--config {write(tmp_path, 'kind: null')}").kind is None


def test_several_texts_follow_one_flag_or_several() -> None:
    assert read("--changes a=1 'b=x y' --lr 0.1 --changes c_d=2").changes == (
        *("a=1", "b=x y", "c_d=2"),
    )
    assert read("").changes == ()


def test_several_texts_come_from_a_file_and_back_out_of_a_run(tmp_path: Path) -> None:
    path = write(tmp_path, "changes: [a=1, b=2]\n")
    assert read(f"--config {path}").changes == ("a=1", "b=2")
    path = write(tmp_path, "changes: a=1\n")
    assert "allowed: a list of texts" in refusal(f"--config {path}")
    stored = {"settings": settings(read("--changes a=1"))}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    (tmp_path / "last.pt").write_text("")
    assert read(f"--resume {tmp_path / 'last.pt'} --epochs 9").changes == ("a=1",)


@dataclass(frozen=True)
class OwnConfig:
    """A recipe whose --config is a file of its own kind."""

    config: str | None = option(None, "a network's description")
    run: RunOptions = field(default_factory=RunOptions)


def test_a_name_of_the_recipe_hides_the_same_name_below_it() -> None:
    cfg = parse(OwnConfig, ["--config", "nets/a.py", "--seed", "3"])
    assert (cfg.config, cfg.run.config, cfg.run.seed) == ("nets/a.py", None, 3)
    assert settings(cfg)["config"] == "nets/a.py"


@dataclass(frozen=True)
class Tool:
    """A script that keeps no run."""

    folder: Path | None = option(None, "what it works on", positional=True)
    count: int | None = option(None, "how many", positional=True)
    tool: ToolOptions = field(default_factory=ToolOptions)


def test_positional_settings_are_typed_without_a_name() -> None:
    cfg = parse(Tool, ["faces", "--amp", "--device", "cpu", "3"])
    assert (cfg.folder, cfg.count) == (Path.cwd() / "faces", 3)
    assert (cfg.tool.amp, cfg.tool.device) == ("auto", "cpu")
    assert cfg.tool.typed == {"folder", "count", "amp", "device"}


@dataclass(frozen=True)
class Several:
    """Texts without a name, and a flag."""

    files: tuple[str, ...] = option((), "what it works on", positional=True)
    count: int = option(1, "how many")


def test_several_texts_may_be_typed_without_a_name() -> None:
    found = parse(Several, ["a.jpg", "b c.jpg", "--count", "2"])
    assert found == Several(("a.jpg", "b c.jpg"), 2)
    with pytest.raises(UserError, match=r"^files is empty, allowed: one or more texts$"):
        parse(Several, ["--count", "2"])


@pytest.mark.parametrize(("line", "named"), [("faces", "COUNT"), ("faces many", "many")])
def test_positional_settings_are_needed_and_checked(line: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse(Tool, line.split())


def test_underscores_in_values_stay() -> None:
    assert read("--name=a_b").name == "a_b"
    assert read("--name a_b").name == "a_b"


def test_an_alias_is_the_same_flag() -> None:
    assert read("--title x").name == "x"
    assert read("--nproc_per_node 2").run.processes.nproc == 2


def test_flags_reach_nested_options_beside_their_defaults() -> None:
    cfg = read("--save-every 9 --nnodes 2")
    assert (cfg.run.save_every, cfg.run.processes.nnodes, cfg.run.log_every) == (9, 2, 7)


def test_what_was_typed_is_known() -> None:
    assert read("--lr 0.1 --seed 3").run.typed == {"lr", "seed"}
    assert read("").run.typed == frozenset()


@pytest.mark.parametrize(
    ("line", "value"), [("--shuffle", True), ("--no-shuffle", False), ("--no_shuffle", False)]
)
def test_a_switch_is_turned_on_and_off(line: str, value: bool) -> None:
    assert read(line).shuffle is value


def test_flags_typed_alone_have_a_meaning_of_their_own() -> None:
    cfg = read("--mode --amp --resume --epochs 1")
    assert (cfg.mode, cfg.run.amp, cfg.run.resume, cfg.epochs) == ("fast", "auto", "auto", 1)
    cfg = read("--mode off --amp bf16 --resume never")
    assert (cfg.mode, cfg.run.amp, cfg.run.resume) == ("off", "bf16", "never")


def test_a_typed_path_is_relative_to_where_it_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert read("--data 'sub dir/数据'").data == tmp_path / "sub dir" / "数据"
    assert read("--data ~/faces").data == Path("/home/somebody/faces")


def test_numbers_may_be_negative_or_in_powers_of_ten() -> None:
    assert read("--lr 5e-4").lr == 0.0005
    assert read("--limit -1").limit == -1


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """What --help prints, white space made single."""
    with pytest.raises(SystemExit) as left:
        parse(Config, ["--help"], usage="How to use it, 100 %.")
    assert left.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_defaults_zero_too(shown: str) -> None:
    assert "samples a step (100 % of them) (default: 8)" in shown
    assert "loader workers (default: 0)" in shown
    assert "directory of the data (default: none)" in shown
    assert "mix the samples (default: on)" in shown


def test_reading_flags_uses_nothing_that_a_later_python_drops() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read("--nproc 2").run.processes.nproc == 2


def test_parse_known_passes_over_the_flags_of_others() -> None:
    @dataclass(frozen=True)
    class Few:
        workers: int = option(0, "")

    assert parse_known(Few, ["--batch-size", "4", "--workers", "2", "stray"]).workers == 2


# files


def test_a_file_is_above_the_defaults_and_below_the_flags(tmp_path: Path) -> None:
    path = write(tmp_path, "batch_size: 16\nlr: 0.5\nsave-every: 11\n")
    cfg = read(f"--config {path} --lr 0.25")
    assert (cfg.batch_size, cfg.lr, cfg.run.save_every, cfg.epochs) == (16, 0.25, 11, 3)
    assert cfg.run.typed == {"config", "batch_size", "lr", "save_every"}


def test_a_json_file_is_read_too_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    text = json.dumps({"batch_size": 2, "data": None, "shuffle": False, "name": "数据"})
    for mark in ("", "\ufeff"):
        path = write(tmp_path, mark + text, "settings.json")
        cfg = read(f"--config {path}")
        assert (cfg.batch_size, cfg.data, cfg.shuffle, cfg.name) == (2, None, False, "数据")


def test_yaml_with_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfbatch_size: 2\r\nlr: 5e-4\r\n")
    cfg = read(f"--config {tmp_path}/a.yaml")
    assert (cfg.batch_size, cfg.lr) == (2, 0.0005)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "# nothing set\n")
    assert settings(read(f"--config {path}")) == settings(Config()) | {"config": path}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("mode: off", "mode", "off"),  # YAML 1.1 reads off as false
        ("mode: fast", "mode", "fast"),
        ("lr: 5e-4", "lr", 0.0005),  # YAML 1.1 reads 5e-4, without a dot, as text
        ("lr: 1", "lr", 1.0),
        ("name: 12", "name", "12"),
        ("limit: null", "limit", None),
        ("shuffle: no", "shuffle", False),
    ],
)
def test_yaml_values_become_what_was_meant(
    tmp_path: Path, text: str, name: str, value: object
) -> None:
    found = getattr(read(f"--config {write(tmp_path, text)}"), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch-szie: 4", ["unknown setting batch-szie", "did you mean batch_size?"]),
        ("run:\n  seed: 1", ["unknown setting run"]),
        ("batch_size: many", ["batch_size", "a whole number from 1 to", "got 'many'"]),
        ("batch_size: 2.0", ["batch_size", "a whole number from 1 to", "got 2.0"]),
        ("batch_size: true", ["batch_size", "a whole number from 1 to", "got True"]),
        ("batch_size: null", ["batch_size", "a whole number from 1 to", "got None"]),
        ("batch_size: [1]", ["batch_size", "a whole number from 1 to", "got [1]"]),
        ("lr: fast", ["lr", "a number from 0 to", "got 'fast'"]),
        ("shuffle: 1", ["shuffle is 1", "true or false"]),
        ("mode: slow", ["mode is 'slow'", "off, fast"]),
        ("data: 3", ["data is 3", "a path"]),
        ("- 1\n- 2", ["`name: value`", "list"]),
        ("just words", ["`name: value`", "str"]),
        ("a: [", ["cannot be read"]),
    ],
)
def test_a_file_with_something_wrong_is_refused_by_name(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    message = refusal(f"--config {write(tmp_path, text)}")
    assert all(word in message for word in [*words, "settings.yaml"]), message


def test_a_file_cannot_run_code(tmp_path: Path) -> None:
    path = write(tmp_path, f"name: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    assert "cannot be read" in refusal(f"--config {path}")
    assert not (tmp_path / "made").exists()


def test_print_config_prints_what_a_file_takes_and_leaves_with_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        read("--batch_size 5 --data /x/数据 --amp off --print-config")
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["batch_size"] == 5
    path = write(tmp_path, printed)
    cfg = read(f"--config {path}")
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


def test_a_resumed_run_takes_what_was_not_typed_from_the_run_that_wrote_it(run_dir: Path) -> None:
    for target in (run_dir, run_dir / "last.pt"):
        cfg = read(f"--resume '{target}'")
        assert (cfg.batch_size, cfg.epochs, cfg.workers, cfg.run.save_every) == (4, 2, 1, 3)
        assert cfg.data == Path("/data/faces")
        assert cfg.run.run_dir == run_dir
        assert cfg.run.resume == str(target)
        assert cfg.run.is_explicit_resume
        assert not cfg.run.dry_run  # asked for anew each time


def test_a_checkpoint_in_a_folder_of_the_run_directory_belongs_to_that_run(run_dir: Path) -> None:
    inside = run_dir / "checkpoints" / "epoch_5.pt"
    inside.parent.mkdir()
    inside.touch()
    cfg = read(f"--resume '{inside}'")
    assert (cfg.batch_size, cfg.run.run_dir, cfg.run.resume) == (4, run_dir, str(inside))
    assert "config.json is missing" in refusal(f"--resume '{inside.parent}'")


def test_a_relative_path_to_resume_from_is_where_it_was_typed(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_dir.parent)
    assert read("--resume run/last.pt").run.resume == str(run_dir / "last.pt")


def test_a_resumed_demo_keeps_the_settings_it_was_started_with(run_dir: Path) -> None:
    demo = {"batch_size": 99, "epochs": 99}
    cfg = parse(Config, ["--demo"], demo=demo)
    assert (cfg.batch_size, cfg.epochs, cfg.run.typed) == (99, 99, {"demo"})
    stored = {"settings": settings(parse(Config, ["--demo", "--epochs", "2"], demo=demo))}
    (run_dir / "config.json").write_text(json.dumps(stored))
    cfg = parse(Config, ["--demo", "--resume", str(run_dir)], demo={"batch_size": 7, "epochs": 7})
    assert (cfg.batch_size, cfg.epochs) == (99, 2)


def test_a_setting_that_a_stored_run_cannot_have_is_refused_with_its_file(run_dir: Path) -> None:
    (run_dir / "config.json").write_text(json.dumps({"settings": {"batch_size": "many"}}))
    message = refusal(f"--resume '{run_dir}'")
    assert f"{run_dir}/config.json: batch_size must be a whole number from 1" in message


def test_length_and_free_settings_may_be_given_anew(run_dir: Path) -> None:
    cfg = read(f"--resume '{run_dir}' --epochs 9 --workers 0 --log-every 1")
    assert (cfg.epochs, cfg.workers, cfg.run.log_every, cfg.batch_size) == (9, 0, 1, 4)


def test_settings_that_change_the_numbers_are_refused_by_name(run_dir: Path) -> None:
    message = refusal(f"--resume '{run_dir}' --batch-size 8 --lr 0.5 --epochs 9")
    assert "batch_size: 4 → 8" in message
    assert "lr: 0.001 → 0.5" in message
    assert "epochs" not in message
    assert "--resume never" in message


def test_the_same_value_typed_again_is_no_change(run_dir: Path) -> None:
    assert read(f"--resume '{run_dir}' --batch-size 4").batch_size == 4


def test_a_file_of_other_settings_is_refused_like_flags(run_dir: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "batch_size: 8")
    assert "batch_size: 4 → 8" in refusal(f"--resume '{run_dir}' --config {path}")


def test_a_path_in_a_file_is_the_same_as_on_the_command_line(run_dir: Path, tmp_path: Path) -> None:
    path = write(tmp_path, f"resume: {run_dir}/last.pt")
    assert read(f"--config {path}").batch_size == 4


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"settings": 3}'])
def test_a_checkpoint_without_its_runs_settings_is_refused(
    tmp_path: Path, content: str | None
) -> None:
    (tmp_path / "last.pt").touch()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert "config.json is missing or was not written by a run" in refusal(f"--resume {tmp_path}")


@pytest.mark.parametrize("word", ["auto", "latest", "never"])
def test_the_words_of_resume_are_no_paths(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / word).touch()
    cfg = read(f"--resume {word}")
    assert (cfg.run.resume, cfg.run.is_explicit_resume) == (word, False)


# what is compared and stored


def test_settings_are_plain_and_can_be_asked_for_by_scope() -> None:
    cfg = read("--data /x --epochs 5")
    assert settings(cfg)["data"] == "/x"
    assert json.loads(json.dumps(settings(cfg))) == settings(cfg)
    assert settings(cfg, ("length",)) == {"epochs": 5}
    identity = settings(cfg, ("result",))
    assert {"batch_size", "lr", "seed", "amp", "demo"} <= identity.keys()
    assert not {"workers", "data", "run_dir", "nproc", "resume", "epochs"} & identity.keys()


def test_differences_are_named_old_to_new() -> None:
    before: dict[str, Any] = {"a": 1, "b": 2, "gone": 3}
    assert differing(before, {"a": 1, "b": 5, "new": None}) == ["b: 2 → 5", "gone: 3 → None"]


def test_parse_own_gives_the_words_of_others_back_in_their_order() -> None:
    @dataclass(frozen=True)
    class Own:
        names: tuple[str, ...] = option((), "names")
        force: bool = option(False, "force")

    own, rest = parse_own(
        Own, ["--lr", "1e-4", "--names", "a", "b", "--force", "--model_size", "x"]
    )
    assert (own.names, own.force) == (("a", "b"), True)
    assert rest == ["--lr", "1e-4", "--model-size", "x"]
