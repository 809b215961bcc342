"""The command line and the system: small memory, odd terminals, Ctrl-C, readers that go away."""

import errno
import os
import sqlite3
import subprocess
import sys

import pytest

from cratelm import cli
from cratelm.commands import ledger
from cratelm.errors import CrateError

LEDGER = ["ledger", "run", "--prompt", "x"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nat x"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
        sqlite3.OperationalError("out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lack_of_memory_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> None:
        try:
            raise error
        except Exception as cause:
            raise ValueError("wrapped by a library") from cause

    monkeypatch.setattr(ledger, "run", run)
    assert cli.main(LEDGER) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: not enough memory (")
    assert err.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
def test_a_small_address_space_ends_in_one_line() -> None:
    """`ulimit -v`: the process is refused its last large piece of memory."""
    code = (
        "import resource; from cratelm import cli; import cratelm.commands.ledger as ledger\n"
        "def run(_):\n    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, -1)); bytearray(1 << 31)\n"
        "ledger.run = run; raise SystemExit(cli.main(['ledger', 'run', '--prompt', 'x']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: not enough memory (MemoryError)")
    assert result.stderr.count("\n") == 1


def test_characters_that_the_terminal_cannot_show_are_replaced() -> None:
    code = (
        "from cratelm import cli; import cratelm.commands.ledger as ledger\n"
        "ledger.run = lambda _: print('caf\\xe9 \\u2192 \\udce9')\n"
        "raise SystemExit(cli.main(['ledger', 'run', '--prompt', 'x']))"
    )
    for encoding, shown in (("ascii", b"caf? ? ?"), ("latin-1", b"caf\xe9 ? ?"), ("utf-8", "café → ?".encode())):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment)
        assert (result.returncode, result.stdout.strip()) == (0, shown), result.stderr


def test_a_line_break_in_a_file_name_stays_in_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> None:
        raise CrateError("two\nlines.txt is not there")

    monkeypatch.setattr(ledger, "run", run)
    assert cli.main(LEDGER) == 2
    assert capsys.readouterr().err == "error: two\\nlines.txt is not there\n"


def test_a_reader_that_goes_away_is_not_an_error() -> None:
    code = "import time; time.sleep(0.5); from cratelm.cli import main; raise SystemExit(main(['--help']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("module", ["cratelm.cli", "difflib", "cratelm.commands.train", "tyro"])
def test_ctrl_c_during_the_imports_prints_no_traceback(module: str) -> None:
    """Ctrl-C in the first tenth of a second: the import of `module` is interrupted."""
    code = f"""
import runpy, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
sys.argv = ["cratelm", "train", "--dry-run", "--out", "x"]
runpy.run_module("cratelm", run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (130, "")
    assert "Traceback" not in result.stderr


def test_python_dash_m_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "cratelm", "nonsense"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: there is no command 'nonsense'")
