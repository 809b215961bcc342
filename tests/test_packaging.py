"""What gets installed: every dependency has an exact pin, the pins agree with the ranges, all extras fit together."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cratelm

REPOSITORY = Path(__file__).parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
FOR_DEVELOPERS = {"dev", "browser-test", "parts-test"}


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def requirements(extra: str | None) -> list[Requirement]:
    """What the project itself asks for: the core's requirements, or those of one extra."""
    listed = PROJECT["dependencies"] if extra is None else EXTRAS[extra]
    return [requirement for requirement in map(Requirement, listed) if requirement.name != "cratelm"]


def test_every_pin_is_exact_and_of_no_special_build() -> None:
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)] == []
    assert lines == sorted(lines, key=str.upper)
    assert len(lines) == len(pins())
    assert not [name for name in pins() if name.startswith("nvidia") or name == "triton"]


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_every_dependency_is_pinned_inside_its_range(extra: str | None) -> None:
    pinned = pins()
    for requirement in requirements(extra):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} excludes the pin {pinned[name]}"


def closure(start: list[Requirement]) -> set[str]:
    """The names of all distributions that the requirements bring, as far as they are installed here.

    What its parent pins exactly itself (as torch does with its CUDA libraries) needs no pin of ours.
    """
    result: set[str] = set()
    waiting = list(start)
    while waiting:
        requirement = waiting.pop()
        key = f"{canonicalize_name(requirement.name)}{sorted(requirement.extras)}"
        if key in result:
            continue
        result.add(key)
        try:
            below = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:
            continue
        for child in map(Requirement, below):
            wanted = child.marker is None or any(
                child.marker.evaluate({"extra": extra}) for extra in (requirement.extras or {""}) | {""}
            )
            if wanted and not str(child.specifier).startswith("=="):
                waiting.append(child)
    return {key.split("[")[0] for key in result}


def test_everything_that_core_and_dev_bring_is_pinned() -> None:
    brought = closure(requirements(None) + requirements("dev"))
    assert {"torch", "sympy", "iniconfig", "pillow"} <= brought
    assert brought - pins().keys() == set()


def test_everything_that_all_extras_bring_is_pinned() -> None:
    brought = closure([requirement for extra in EXTRAS for requirement in requirements(extra)])
    assert brought - pins().keys() == set()


def test_all_names_every_extra_of_a_user() -> None:
    assert EXTRAS["all"] == [f"cratelm[{','.join(extra for extra in EXTRAS if extra not in FOR_DEVELOPERS | {'all'})}]"]


def test_what_is_installed_fits_together() -> None:
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("extra", [extra for extra in EXTRAS if extra not in FOR_DEVELOPERS | {"all"}])
def test_every_package_of_an_extra_imports(extra: str, tmp_path: Path) -> None:
    names = {canonicalize_name(requirement.name) for requirement in requirements(extra)}
    missing = sorted(name for name in names if not _is_installed(name))
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (make test-all installs every extra)")
    modules = [
        module
        for module, owners in metadata.packages_distributions().items()
        if names & set(map(canonicalize_name, owners)) and module.isidentifier() and not module.startswith("_")
    ]
    code = "\n".join(f"import {module}" for module in modules)
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=offline)
    assert result.returncode == 0, f"{modules}: {result.stderr}"


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def test_the_version_is_the_same_everywhere() -> None:
    version = re.escape(cratelm.__version__)
    assert re.search(rf"^version: {version}$", (REPOSITORY / "CITATION.cff").read_text(), re.MULTILINE)
    first = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] == cratelm.__version__


def test_the_license_is_named_alike() -> None:
    assert PROJECT["license"] == "MIT"
    assert (REPOSITORY / "LICENSE").read_text().startswith("MIT License")
