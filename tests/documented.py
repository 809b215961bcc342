"""The code blocks of a page of the documentation, as files that can be run."""

from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def code_block(page: str, section: str, to: Path, *, model: Path) -> Path:
    """Write the first Python block of a section of a page to a file, with the model it opens replaced."""
    text = (DOCS / page).read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    code = text.split("```python\n")[1].split("```")[0]
    assert "runs/crate-2l/model" in code
    to.write_text(code.replace("runs/crate-2l/model", str(model)))
    return to
