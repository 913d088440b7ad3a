"""What people see while a run goes on."""

import contextlib
import os
import signal

import pytest

from lightship.cli.display import Bar, stages


def bar_at(*moments):
    """The bar's text after each (seconds since the start, line)."""
    now = [0.0]
    bar = Bar(clock=lambda: now[0])
    for second, line in moments:
        now[0] = second
        if line:
            bar.open(line)
    return bar.text()


def test_eta_follows_the_predicted_shares():
    assert bar_at((0, "[1/3, 0%] read"), (5, "")) == "[1/3] read   0%   0:05"  # nothing known yet
    assert bar_at((0, "[1/3, 0%] read"), (20, "[2/3, 10%] export")) == "[2/3] export   10%   0:20, about 3:00 left"
    assert bar_at((80, "[3/3, 40%] evaluate"), (100, "")) == "[3/3] evaluate   40%   1:40, about 1:40 left"
    assert bar_at((80, "[3/3, 40%] evaluate"), (900, "")).endswith("about 0:00 left")  # never negative


def test_without_a_prediction_stages_count_equally():
    assert bar_at((30, "[3/4] speed and memory")) == "[3/4] speed and memory   50%   0:30, about 0:30 left"


def test_ctrl_c_that_a_library_swallowed_is_heard_at_the_next_line(capsys):
    with stages() as listen:
        listen("[1/2] read")
        with contextlib.suppress(KeyboardInterrupt):  # as an import may do
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            listen("[2/2] export")
    assert "export" not in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
