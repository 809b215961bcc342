"""Sources of text: what is read, in which order, and the one line a bad source gets."""

import gzip
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from cratelm.data import lines
from cratelm.data.text import fingerprint, list_files, source_bytes, stream_documents
from cratelm.errors import CrateError


def texts(*sources: Path | str, skip_bad: bool = False) -> list[str]:
    return [document.text for document in stream_documents([str(source) for source in sources], skip_bad=skip_bad)]


def refusal(*sources: Path | str, skip_bad: bool = False) -> str:
    """The one line that reading these sources ends with."""
    with pytest.raises(CrateError) as caught:
        texts(*sources, skip_bad=skip_bad)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def rows(rng: np.random.Generator) -> list[str]:
    """Texts with line ends, wide characters and any length."""
    letters = np.array(list('ab é\n漢😀"\\'))
    return ["x" + "".join(rng.choice(letters, size=size)) for size in rng.integers(0, 400, size=60)]


def pile(rows: list[str]) -> bytes:
    return "".join(json.dumps({"text": row, "meta": {"pile_set_name": "Books3"}}) + "\n" for row in rows).encode()


def frames(data: bytes, cut: int) -> bytes:
    """Two zstd frames one after the other, as `cat a.zst b.zst` makes them."""
    return zstandard.compress(data[:cut]) + zstandard.compress(data[cut:])


def test_every_file_type_gives_the_same_documents(tmp_path: Path, rows: list[str]) -> None:
    data = pile(rows)
    (tmp_path / "a.jsonl").write_bytes(data + b"\n  \n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data[:999]) + gzip.compress(data[999:]))
    (tmp_path / "a.jsonl.zst").write_bytes(frames(data, 1234))
    pyarrow.parquet.write_table(
        pyarrow.table({"id": range(60), "text": rows}), tmp_path / "a.parquet", row_group_size=7
    )
    for file in tmp_path.iterdir():
        assert texts(file) == rows, file


def test_lines_are_whole_however_the_chunks_cut_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: list[str]
) -> None:
    monkeypatch.setattr(lines, "_CHUNK", 3)
    (tmp_path / "a.jsonl.zst").write_bytes(frames(pile(rows), 50))
    assert texts(tmp_path / "a.jsonl.zst") == rows


def test_what_follows_the_end_of_gzip_data_is_ignored_as_gzip_does(
    tmp_path: Path, rows: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = gzip.compress(pile(rows))
    for tail, noted in ((b"\0", False), (b"\0" * 200_000, False), (b"\x1e garbage", True), (b"\0" * 99 + b"x", True)):
        (tmp_path / "a.jsonl.gz").write_bytes(data + tail)
        assert texts(tmp_path / "a.jsonl.gz") == rows
        assert ("after the end of the gzip data" in " ".join(capsys.readouterr().err.split())) == noted
    heard: list[int] = []
    list(stream_documents([str(tmp_path / "a.jsonl.gz")], on_bytes=heard.append))
    assert sum(heard) == len(data) + 100
    (tmp_path / "a.jsonl.gz").write_bytes(data + data[:99])
    assert "truncated or damaged after line 60" in refusal(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_how_a_file_is_read(tmp_path: Path, rows: list[str], encoding: str) -> None:
    data = json.dumps({"text": rows[0]}, ensure_ascii=False) + "\r\n" + json.dumps({"text": rows[1]}) + "\n"
    (tmp_path / "a.jsonl").write_bytes(data.encode(encoding))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data.encode(encoding)))
    (tmp_path / "c.txt").write_bytes(rows[2].encode(encoding))
    assert texts(tmp_path) == [*rows[:2], *rows[:2], rows[2]]


def test_a_file_cut_inside_a_character_of_utf_16_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "x"}\n{"text": "y"}'.encode("utf-16")[:-1])
    assert "a.jsonl: truncated or damaged after line 1" in refusal(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_bytes("ab".encode("utf-16")[:-1])
    assert "a.txt: byte 0x62 at position 4 (line 1) is not utf-16" in refusal(tmp_path / "a.txt")


def test_zero_bytes_at_the_end_of_json_lines_are_not_a_line(tmp_path: Path, rows: list[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(pile(rows) + b"\0" * 4096)
    assert texts(tmp_path) == rows


def test_folders_behind_links_are_read_once_and_a_link_to_nowhere_is_reported(tmp_path: Path) -> None:
    for name in ("elsewhere/b.txt", "elsewhere/deep/c.txt", "here/a.txt", "here/inner/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name[-5])
    here = tmp_path / "here"
    (here / "more").symlink_to(tmp_path / "elsewhere")
    (here / "again").symlink_to(here / "inner")
    (here / "inner" / "loop").symlink_to(here)
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    assert texts(here) == ["a", "d", "b", "c"]
    (here / "gone.txt").symlink_to(tmp_path / "nothing")
    assert "gone.txt: cannot be read (No such file or directory)" in refusal(here)
    assert texts(here, skip_bad=True) == ["a", "d", "b", "c"]
    assert source_bytes([str(here)]) == 4
    assert fingerprint([str(here)])


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary"])
def test_a_parquet_row_that_is_not_utf8_loses_that_row_alone(tmp_path: Path, rows: list[str], kind: str) -> None:
    data: list[bytes | None] = [row.encode() for row in rows]
    data[49], data[51] = b"caf\xe9", None
    wide = "large" in kind
    column = pyarrow.array(data, pyarrow.large_binary() if wide else pyarrow.binary())
    if "binary" not in kind:
        text = pyarrow.large_string() if wide else pyarrow.string()
        column = pyarrow.Array.from_buffers(text, 60, column.buffers(), column.null_count)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    skipped: list[str] = []
    documents = list(stream_documents([str(tmp_path)], skip_bad=True, on_bad=skipped.append))
    assert [document.text for document in documents] == rows[:49] + rows[50:51] + rows[52:]
    assert [problem.removeprefix(str(tmp_path)) for problem in skipped] == [
        "/a.parquet:50: byte 0xe9 at position 3 of the text is not utf-8",
        "/a.parquet:52: the text field 'text' holds a NoneType, not a text",
    ]


def test_a_parquet_column_of_categories_loses_the_bad_row_alone(tmp_path: Path) -> None:
    names = pyarrow.array([b"caf\xe9", b"tea"], pyarrow.binary())
    names = pyarrow.Array.from_buffers(pyarrow.string(), 2, names.buffers())
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([1, 0, 1], pyarrow.int32()), names)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert texts(tmp_path, skip_bad=True) == ["tea", "tea"]
    assert "a.parquet:2: byte 0xe9 at position 3 of the text is not utf-8" in refusal(tmp_path)


def test_a_folder_is_read_in_sorted_order_without_hidden_and_other_files(tmp_path: Path) -> None:
    names = ["b/z.txt", "b/a.md", "a.py", "c.rst", "B.TXT", ".hidden/x.txt", "b/.y.txt", "b/__pycache__/x.py", "p.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").write_text("")
    assert texts(tmp_path) == ["B.TXT", "a.py", "b/a.md", "b/z.txt", "c.rst"]
    assert [document.origin for document in stream_documents([str(tmp_path / "c.rst")])] == [str(tmp_path / "c.rst")]


def test_python_source_is_read_in_its_declared_encoding_and_marks_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes("# coding: latin-1\nx = 'é'\r\n".encode("latin-1"))
    (tmp_path / "b.py").write_bytes(b"\xef\xbb\xbfx = 1\n")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfc")
    assert texts(tmp_path) == ["# coding: latin-1\nx = 'é'\r\n", "x = 1\n", "c"]


def test_stdlib_is_the_library_without_tests_and_installed_packages() -> None:
    names = [file.name for file in list_files("stdlib")]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py", "pydoc_data/topics.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(Path(name).parts[:-1])]
    assert not [name for name in names if name.startswith(("encodings/", "_sysconfigdata"))]
    documents = list(stream_documents(["stdlib"]))
    assert 300 < len(documents) <= len(names)
    assert sum(len(document.text) for document in documents) > 5_000_000


def test_files_of_stdlib_share_little_with_one_another() -> None:
    """Documents are split by a hash, which keeps apart what is the same, not what is nearly the same."""
    owners: dict[str, set[str]] = {}
    total = 0
    for document in stream_documents(["stdlib"]):
        lines = [line.strip() for line in document.text.splitlines() if len(line.strip()) >= 40]
        total += len(lines)
        for line in lines:
            owners.setdefault(line, set()).add(document.origin)
    assert sum(len(files) for files in owners.values() if len(files) > 1) < 0.06 * total


def test_stdlib_leaves_out_what_a_build_made_and_nothing_that_is_only_named_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("encodings/cp037.py", "_sysconfigdata__linux_x86_64.py", "encodings.py", "sysconfig.py", "a/tests.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [file.name for file in list_files("stdlib")] == ["a/tests.py", "encodings.py", "sysconfig.py"]
    assert len(list_files(str(tmp_path))) == 5


def test_stdlib_skips_an_undecodable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.py").write_text("good")
    (tmp_path / "bad.py").write_bytes(b"x = 1\ny = '\xe9'\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    skipped: list[str] = []
    assert [document.text for document in stream_documents(["stdlib"], on_bad=skipped.append)] == ["good"]
    assert skipped == [f"{tmp_path / 'bad.py'}: byte 0xe9 at position 11 (line 2) is not utf-8"]


def test_real_text_of_the_piles_schema_is_read_whole(real_data: Path) -> None:
    file = real_data / "minipile" / "val.jsonl.zst"
    with zstandard.open(file, "rt", encoding="utf-8") as lines:
        expected = [json.loads(line)["text"] for line in lines]
    heard: list[int] = []
    actual = [document.text for document in stream_documents([str(file)], on_bytes=heard.append)]
    assert actual == expected
    assert sum(heard) == source_bytes([str(file)]) == file.stat().st_size


def test_the_fingerprint_changes_with_any_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    before = fingerprint([str(tmp_path)])
    assert fingerprint([str(tmp_path)]) == before
    (tmp_path / "b.txt").write_text("")
    assert fingerprint([str(tmp_path)]) != before


BAD_LINES = [
    (b'{"text": "cut', r"a.jsonl:2: broken JSON \(Unterminated string starting at at column 10\)"),
    (b'{"body": "x", "id": 1}', r"a.jsonl:2: no text field 'text' \(fields: body, id\)"),
    (b'{"text": null}', r"a.jsonl:2: the text field 'text' holds a NoneType, not a text"),
    (b'{"text": "x", "id": ' + b"9" * 5000 + b"}", r"a.jsonl:2: JSON beyond what can be read \(Exceeds the limit .*\)"),
    (b'{"text": ' + b"[" * 100_000, r"a.jsonl:2: JSON beyond what can be read \(maximum recursion depth .*\)"),
    (b'["text"]', r"a.jsonl:2: a list, not a JSON object"),
    (b'{"text": "a\xff"}', r"a.jsonl:2: byte 0xff at position 11 of the line is not utf-8"),
    (b'{"text": "ab\\ud800"}', r"a.jsonl:2: half a surrogate pair at character 2, not text"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    with pytest.raises(CrateError, match=f"{message}. Repair or remove it, or go past it with --skip-bad"):
        texts(file)
    skipped: list[str] = []
    actual = [document.text for document in stream_documents([str(file)], skip_bad=True, on_bad=skipped.append)]
    assert actual == ["one", "three"]
    assert len(skipped) == 1


def test_an_undecodable_text_file_names_byte_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é\nok\nbad ".encode() + b"\xff!")
    assert "a.txt: byte 0xff at position 10 (line 3) is not utf-8" in refusal(tmp_path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_truncated_file_is_refused_or_read_up_to_the_cut(
    tmp_path: Path, suffix: str, rng: np.random.Generator
) -> None:
    rows = ["".join(map(chr, rng.integers(97, 123, size=2000))) for _ in range(200)]
    file = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), file)
    else:
        file.write_bytes((gzip.compress if suffix.endswith("gz") else zstandard.compress)(pile(rows)))
    file.write_bytes(file.read_bytes()[: int(rng.integers(file.stat().st_size // 2, file.stat().st_size))])
    assert f"a{suffix}: truncated or damaged after" in refusal(file)
    (tmp_path / "b.txt").write_text("more")
    actual = texts(file, tmp_path / "b.txt", skip_bad=True)
    assert actual[-1] == "more"
    assert actual[:-1] == rows[: len(actual) - 1]


def test_a_file_that_is_not_an_archive_is_refused(tmp_path: Path) -> None:
    for suffix in ("gz", "zst"):
        (tmp_path / f"a.jsonl.{suffix}").write_bytes(b"plain text, not an archive")
        assert "truncated or damaged after line 0" in refusal(tmp_path / f"a.jsonl.{suffix}")


def test_a_parquet_without_the_column_lists_its_columns(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    assert "has no column 'text' (columns: body, id). Give another --text-field" in refusal(tmp_path / "a.parquet")
    assert [d.text for d in stream_documents([str(tmp_path / "a.parquet")], text_field="body")] == ["x"]


def test_a_source_that_is_missing_empty_or_unknown_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.txt").write_text("")
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.png").write_text("x")
    assert "nowhere does not exist" in refusal("nowhere")
    assert "no source of text was given" in refusal()
    assert "no source of text was given" in refusal("")
    assert "no document with text in" in refusal(tmp_path / "e.txt")
    assert "a.pdf is of an unknown type. Known types: .txt .md" in refusal(tmp_path / "a.pdf")
    assert "holds no text file (found: 1 .png)" in refusal(tmp_path / "folder")


def test_sources_are_checked_before_the_first_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(CrateError, match="nowhere does not exist"):
        stream_documents([str(tmp_path / "a.txt"), "nowhere"])


def test_a_dataset_of_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        asked.append((name, config, split, streaming))
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    documents = list(stream_documents(["hf:monology/pile:clean"]))
    assert asked == [("monology/pile", "clean", "train", True)]
    assert [(document.text, document.origin) for document in documents] == [
        ("one", "hf:monology/pile:clean:1"),
        ("two", "hf:monology/pile:clean:2"),
    ]


def test_a_dataset_that_cannot_be_loaded_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal("hf:a/b") == "hf:a/b needs the package datasets. Run: pip install 'cratelm[hf]'"

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unreachable))
    assert "hf:a/b cannot be streamed (no route)" in refusal("hf:a/b")
