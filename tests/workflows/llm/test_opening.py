"""Opening language models: what is missing is named."""

import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures.planted_rules import make_planted

from cratelm.cli import main


@pytest.mark.parametrize("package", ["transformers", "torch"])
def test_a_model_directory_without_the_package_that_opens_it_is_refused_in_one_line(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "cratelm.local_llm", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    run = make_planted(tmp_path / "crate-1l", np.random.default_rng(7))
    assert main(["explain", str(run), "--llm", str(tmp_path)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"this process, which needs {package}. Hint: pip install 'cratelm[llm]'" in message
