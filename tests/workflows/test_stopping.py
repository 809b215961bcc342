"""Ctrl-C during training: answered at once, obeyed after the step, and a second one interrupts."""

import os
import signal

import pytest

from cratelm.workflows.stopping import stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_is_answered_at_once_and_stops_after_the_step(
    number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with stopping() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert capfd.readouterr().err == "\nstopping after this step\n"
        os.kill(os.getpid(), signal.SIGTERM)
        assert capfd.readouterr().err == ""
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
