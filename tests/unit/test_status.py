import errno
import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from shared import status
from shared.status import Status

FIELDS = {
    *("schema", "recipe", "state", "exit_code", "reason", "pid", "host", "world_size", "step"),
    *("total_steps", "epoch", "eta_s", "started_at", "updated_at", "last", "best", "result"),
    "outputs",
}


def begin(run_dir: Path) -> Status:
    return Status(run_dir, recipe="probe", pid=os.getpid(), world_size=1, total_steps=9)


def written(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


def test_the_file_has_every_field_of_the_contract(tmp_path: Path) -> None:
    kept = begin(tmp_path)
    kept.write(step=3, epoch=1, eta_s=2.5)
    kept.write(best={"loss": 0.5})
    fields = written(tmp_path)
    assert fields.keys() >= FIELDS
    assert (fields["state"], fields["step"], fields["exit_code"]) == ("running", 3, None)
    assert (fields["recipe"], fields["host"]) == ("probe", socket.gethostname())


def test_times_are_utc_in_iso_8601_whatever_the_time_zone(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    try:
        before = time.gmtime()
        begin(tmp_path).write()
        stamp = time.strptime(written(tmp_path)["updated_at"], "%Y-%m-%dT%H:%M:%SZ")
        assert before[:6] <= stamp[:6] <= time.gmtime()[:6]
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_result_of_nan_is_written_as_null(tmp_path: Path) -> None:
    """A run whose figure came out as NaN is done all the same, and says so."""
    begin(tmp_path).write(state="done", result={"name": "loss", "after": math.nan})
    assert written(tmp_path)["state"] == "done"
    assert written(tmp_path)["result"]["after"] is None


def test_a_disk_that_refuses_costs_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(status, "write_json", refuse)
    begin(tmp_path).write()
    assert "status.json cannot be written" in caplog.text
    assert "No space left" in caplog.text


def test_a_run_that_could_not_close_itself_is_closed_as_failed_and_one_that_ended_is_not(tmp_path):
    kept = begin(tmp_path)
    kept.write(step=4)
    status.close(tmp_path, 1, "rank 1 was killed by SIGKILL")
    fields = written(tmp_path)
    assert (fields["state"], fields["exit_code"], fields["step"]) == ("failed", 1, 4)
    assert fields["reason"] == "rank 1 was killed by SIGKILL"
    kept.write(state="done", exit_code=0, reason="its own")
    before = written(tmp_path)
    status.close(tmp_path, 1, "another")
    assert written(tmp_path) == before
