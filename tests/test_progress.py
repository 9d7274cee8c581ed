"""What a run tells: a bar on a terminal, lines elsewhere, nothing on all processes but the first."""

import json

import pytest
from absl import logging

from parallel import distributed
from workdir import progress
from workdir.progress import TrainingProgress


def open_progress(workdir, first_step=0):
    return TrainingProgress(workdir, first_step=first_step, num_steps=100, batch_size=8)


def records(workdir):
    return [json.loads(line) for line in (workdir / "losses.jsonl").read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_have_step_loss_rate_and_time_left(tmp_path, caplog, clock):
    logging.set_verbosity(logging.INFO)
    with open_progress(tmp_path) as bar:
        clock[0] += 2.0
        bar.show(20, 0.5)
        with bar.pause():
            clock[0] += 1000.0  # such as drawing samples
        clock[0] += 1.0
        bar.show(30, 0.25)
    assert "step 20/100: loss 0.5000, 80 images/s, 00:08 left" in caplog.text
    assert "step 30/100: loss 0.2500, 80 images/s, 00:07 left" in caplog.text


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with open_progress(tmp_path) as bar:
        bar.show(50, 0.125)
    shown = capsys.readouterr().err
    assert "50/100" in shown
    assert "loss 0.1250" in shown
    assert "images/s" in shown
    assert "step 50/100" not in caplog.text


def test_other_processes_are_silent(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    with open_progress(tmp_path) as bar:
        bar.show(50, 0.125)
        bar.record(50, loss=0.125)
    assert list(progress.track([1, 2], "work")) == [1, 2]
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == caplog.text == ""


def test_a_resumed_run_forgets_what_it_will_do_again(tmp_path):
    with open_progress(tmp_path) as bar:
        for step in (10, 20, 30):
            bar.record(step, loss=step / 10)
    with (tmp_path / "losses.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # cut short by a kill
    with open_progress(tmp_path, first_step=20) as bar:
        bar.record(30, loss=9.0, eval_loss=8.0)
    assert records(tmp_path) == [
        {"step": 10, "loss": 1.0},
        {"step": 20, "loss": 2.0},
        {"step": 30, "loss": 9.0, "eval_loss": 8.0},
    ]
