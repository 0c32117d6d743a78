"""Stop signals at any moment of a start: one closing line, the right code, nothing left."""

import signal
import time

import pytest

from tests.harness import PROBE, start, status_of, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.limit(240)]

MOMENTS = [0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7, 1.9,
           2.2, 2.5, 2.8, 3.1, 3.5, 3.9, 4.3, 4.8, 5.4, 6.0]  # fmt: skip
FEW = {(0.3, 1), (0.7, 1), (0.9, 2), (1.5, 2), (2.2, 2)}  # of them in the default tier


def every_moment():
    """Each moment with one process and with two, Ctrl-C now and then."""
    for number, moment in enumerate(MOMENTS):
        for ranks in (1, 2):
            marks = [] if (moment, ranks) in FEW else [pytest.mark.full]
            sent = signal.SIGINT if (number + ranks) % 4 == 0 else signal.SIGTERM
            yield pytest.param(moment, ranks, sent, marks=marks, id=f"{moment}-{ranks}-{sent.name}")


@pytest.mark.parametrize(("moment", "ranks", "sent"), [*every_moment()])
def test_a_stop_signal_at_any_moment_of_a_start_is_answered_with_one_line(
    tmp_path, moment, ranks, sent
):
    run_dir, code = tmp_path / "run", 130 if sent is signal.SIGINT else 143
    args = [PROBE, "--nproc", ranks, "--epochs", 100, "--step-ms", 50, "--run-dir", run_dir]
    with start(args) as running:
        time.sleep(moment)
        running.signal(sent)
        outcome = running.finish()
        assert running.leaves_nothing()
    if outcome.code == -sent and not outcome.text:
        return  # before the script's first line: the interpreter's own end
    assert outcome.code == code, outcome.text
    closing = [line for line in outcome.text.splitlines() if f"(exit {code})" in line]
    assert len(closing) == 1 and closing[0] == outcome.last_line, outcome.text
    assert sent.name in closing[0] and "Traceback" not in outcome.text
    if (run_dir / "status.json").exists():
        status = status_of(run_dir)
        assert (status["state"], status["exit_code"]) == ("stopped", code)


def test_a_stop_in_an_evaluation_of_uneven_length_leaves_on_every_rank(tmp_path):
    """Rank 1 has half of rank 0's batches: no exchange between the ranks may wait in the loop."""
    run_dir = tmp_path / "run"
    args = [PROBE, "--nproc", 2, "--epochs", 1, "--judge-batches", 600, "--run-dir", run_dir]
    with start(args) as running:
        wait_until(lambda: "evaluation" in str(status_of(run_dir).get("doing")),
                   "the evaluation", running=running)  # fmt: skip
        running.signal(signal.SIGTERM)
        asked = time.monotonic()
        outcome = running.finish()
        assert time.monotonic() - asked < 10
        assert running.leaves_nothing()
    status = status_of(run_dir)
    assert (outcome.code, status["state"]) == (143, "stopped"), outcome.text
    assert status["step"] == status["total_steps"] and status["result"] is None
    with start([*args[:-4], "--judge-batches", 2, "--run-dir", run_dir]) as running:
        again = running.finish()
    assert again.code == 0 and "this run is finished" in again.text, again.text
    assert status_of(run_dir)["state"] == "done"
