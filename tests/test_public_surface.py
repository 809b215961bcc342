"""The public names of `cratelm`, and what importing it costs."""

import subprocess
import sys

import pytest
from test_house import NO_TORCH, REPOSITORY, files, module_name

import cratelm


def modules_loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh Python has loaded after the code."""
    code += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_import_cratelm_loads_nothing_heavy() -> None:
    loaded = modules_loaded_by("import cratelm; dir(cratelm)")
    assert not loaded & {"torch", "numpy", "transformers", "tokenizers", "pyarrow", "matplotlib", "rich", "tyro"}
    assert "cratelm" in loaded


def test_nothing_above_the_record_line_loads_torch() -> None:
    names = [
        module_name(REPOSITORY, file)
        for file in files(REPOSITORY, "cratelm")
        if file.relative_to(REPOSITORY / "cratelm").as_posix().startswith(NO_TORCH) and file.stem != "__init__"
    ]
    loaded = modules_loaded_by("\n".join(f"import {name}" for name in names))
    assert {"cratelm", "numpy"} <= loaded
    assert "torch" not in loaded


@pytest.mark.parametrize("name", cratelm.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert name in dir(cratelm)
    assert getattr(cratelm, name) is not None


def test_a_name_that_is_not_public_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        cratelm.lode  # noqa: B018
