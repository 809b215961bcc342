"""The lock on a run directory, also on file systems without locks."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_rundir import dead_process

from cratelm.errors import CrateError
from cratelm.rundir import claim

HOLDER = """
import sys, time
from pathlib import Path
from cratelm.rundir import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_in_use_is_refused_and_names_the_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):
            with (
                pytest.raises(CrateError, match=rf"run is in use by process {holder.pid} on \S+ \(-c .*\). Wait"),
                claim(run),
            ):
                pytest.fail("claimed twice")
        holder.kill()
    with claim(run), pytest.raises(CrateError, match=f"in use by process {os.getpid()} "), claim(run):
        pytest.fail("claimed twice")
    with claim(run):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_warning_and_trusts_the_note(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with claim(tmp_path):
        assert capsys.readouterr().err.startswith(f"warning: {tmp_path} cannot be locked ({os.strerror(code)})")
        with pytest.raises(CrateError, match=rf"in use by process {os.getpid()} on .* remove {tmp_path}/.lock"):
            claim(tmp_path).__enter__()
    (tmp_path / ".lock").write_text(f"process {dead_process()} on {socket.gethostname()} (cratelm train)")
    with claim(tmp_path):
        pass
    (tmp_path / ".lock").write_text(f"process {dead_process()} on elsewhere (cratelm train)")
    with pytest.raises(CrateError, match="on elsewhere"), claim(tmp_path):
        pytest.fail("claimed twice")


def test_a_claim_ends_with_its_block(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claim(tmp_path):
        raise ZeroDivisionError
    with claim(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == ""
