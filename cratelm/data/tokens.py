"""Token directories: documents -> flat files of token ids as nanoGPT writes them, and batches read from them.

`train.bin`, `val.bin` and `test.bin` hold little-endian ids, each document followed by `<|endoftext|>`; `tokens.json`
next to them records tokenizer, counts, sources and hashes (`docs/formats.md`).
"""

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt
from tokenizers import Tokenizer

from cratelm import runtime
from cratelm.checksums import sha256_of, verify
from cratelm.data.shards import SPLIT_NAMES, Split, dtype_for, little_endian, split_of, write_shards
from cratelm.data.special_tokens import choose_end, choose_known, end_of_text_id
from cratelm.data.text import Document, fingerprint, source_bytes, stream_documents
from cratelm.data.tokenizer import (
    folder_of,
    load_tokenizer,
    token_bytes,
    tokenizer_hash,
    train_bpe,
    vocabulary_size,
)
from cratelm.errors import CrateError
from cratelm.rundir import atomic_path, differing_fields, origin, read_json, remove_leftovers, write_json

BPE_TRAINING_CHARACTERS = 100_000_000
"""A `bpe:N` tokenizer is trained on this many first characters of the training split."""

_BLOCK = 1 << 22  # tokens looked at together when a shard is scanned


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenDirectory:
    """A folder of shards whose sizes were checked against `tokens.json`."""

    path: Path
    vocab_size: int
    """One more than the largest id of the tokenizer."""
    end_of_text: int
    dtype: str
    """`uint16` or `uint32`."""
    tokenizer_hash: str
    splits: Mapping[str, Split]
    tokenizer_source: str
    """A file inside the folder; for a nanoGPT folder, the value of --tokenizer."""
    source: Mapping[str, Any]
    """Settings, hash of the document stream, skipped documents, time and versions; empty for a nanoGPT folder."""
    begin_of_text: tuple[int, ...] | None = None
    """The token of --begin-token, with which a model's rows over these tokens begin; None: as its tokenizer does."""
    tokenizer_sha256: str | None = None
    """Of the bytes of the tokenizer's file; None in older folders."""

    @classmethod
    def open(cls, path: Path, *, tokenizer: str | None = None) -> "TokenDirectory":
        """Open a folder and check the size of every shard; `tokens` checks the sha256 of the one it reads.

        A nanoGPT folder, without tokens.json, needs a `tokenizer`; in other folders a given one must match the hash.
        """
        if not (path / "tokens.json").is_file():
            return _open_bare(path, tokenizer)
        value = read_json(path / "tokens.json", made_by=f"cratelm tokenize SOURCE --out {path}")
        try:
            splits = {name: Split(**counts) for name, counts in value["splits"].items()}
            keys = ("vocab_size", "end_of_text", "dtype", "tokenizer_hash", "source")
            fields = {key: value[key] for key in keys} | {"tokenizer_source": value["tokenizer"]}
            begin, checksum = value.get("begin_of_text"), value.get("tokenizer_sha256")
            fields |= {"begin_of_text": None if begin is None else tuple(begin), "tokenizer_sha256": checksum}
        except (KeyError, TypeError, AttributeError) as error:
            raise CrateError(f"{path / 'tokens.json'} lacks or misspells a field ({error}). Tokenize again") from None
        directory = cls(path=path, splits=splits, **fields)
        _check_shards(directory)
        if tokenizer is not None and tokenizer_hash(load_tokenizer(tokenizer)) != directory.tokenizer_hash:
            raise CrateError(f"{path} has another tokenizer than {tokenizer}. Leave --tokenizer out")
        return directory

    def tokens(self, split: str) -> UInt[np.ndarray, " tokens"]:
        """All ids of a split, mapped read-only. Raises CrateError if their sha256 is not the one in tokens.json."""
        if split not in self.splits:
            raise CrateError(
                f"{self.path} has no split {split} (found: {', '.join(self.splits)}). "
                "Tokenize again with a share for it: --held-out for val, --test for test"
            )
        shard = self.path / f"{split}.bin"
        if (expected := self.splits[split].sha256) is not None:
            verify(shard, expected, hint="Tokenize again")
        return np.memmap(shard, dtype=little_endian(self.dtype), mode="r")

    def documents(self, split: str) -> Int64[np.ndarray, " boundaries"]:
        """The start of each document, then the number of tokens: document i is `tokens[o[i]:o[i + 1]]`.

        A document ends in `<|endoftext|>`, except that the last document of a nanoGPT folder may lack it.
        """
        tokens = self.tokens(split)
        boundaries = [np.zeros(1, dtype=np.int64)]
        for start in range(0, len(tokens), _BLOCK):
            block = tokens[start : start + _BLOCK]
            self._check_ids(split, block, start)
            boundaries.append(np.flatnonzero(block == self.end_of_text).astype(np.int64) + start + 1)
        if tokens[-1] != self.end_of_text:
            boundaries.append(np.array([len(tokens)], dtype=np.int64))
        return np.concatenate(boundaries)

    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of the text; for a nanoGPT folder the summed bytes of its tokens (exact for a byte-level BPE)."""
        tokens, known = self.tokens(split), self.splits[split].text_bytes
        if known is not None:
            return known
        lengths = np.array([len(text) for text in token_bytes(self.tokenizer())])
        lengths[self.end_of_text] = 0
        total = 0
        for start in range(0, len(tokens), _BLOCK):
            block = tokens[start : start + _BLOCK]
            self._check_ids(split, block, start)
            total += int(lengths[block].sum())
        return total

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of these tokens; its file is checked too, since another decoder shows other texts."""
        inside = self.path / self.tokenizer_source
        if self.source and not inside.is_file():
            raise CrateError(f"{inside} is missing. Tokenize again, or put back the file that made the tokens")
        tokenizer = load_tokenizer(inside if self.source else self.tokenizer_source)
        if tokenizer_hash(tokenizer) != self.tokenizer_hash:
            raise CrateError(f"{inside} is not the tokenizer that made the tokens next to it. Tokenize again")
        verify(inside, self.tokenizer_sha256, hint="Tokenize again, or put back the file")
        return tokenizer

    def _check_ids(self, split: str, block: UInt[np.ndarray, " block"], start: int) -> None:
        if block.max() >= self.vocab_size:
            at = int(np.argmax(block >= self.vocab_size))
            raise CrateError(
                f"{self.path / split}.bin: id {block[at]} at token {start + at} is outside the vocabulary of "
                f"{self.vocab_size}: not {self.dtype}, or another tokenizer. Name the right one with --tokenizer"
            )


def _open_bare(path: Path, tokenizer: str | None) -> TokenDirectory:
    shards = [name for name in SPLIT_NAMES if (path / f"{name}.bin").is_file()]
    if not shards:
        raise CrateError(
            f"{path} is not a token directory (no tokens.json, no train.bin). Run: cratelm tokenize SOURCE --out {path}"
        )
    if tokenizer in (None, "gpt2") and (path / "meta.pkl").is_file():
        raise CrateError(
            f"{path} has a meta.pkl: nanoGPT's tokens of one letter each, without an end of text. Hint: tokenize the "
            f"text again: cratelm tokenize {path / 'input.txt'} --tokenizer bpe:512 --out DIR"
        )
    if tokenizer is None:
        raise CrateError(f"{path} has no tokens.json, so --tokenizer is needed. For nanoGPT's files: --tokenizer gpt2")
    loaded = load_tokenizer(tokenizer)
    dtype = dtype_for(vocabulary_size(loaded))
    splits = {}
    for name in shards:
        size, width = (path / f"{name}.bin").stat().st_size, np.dtype(dtype).itemsize
        if size == 0 or size % width:
            raise CrateError(f"{path / name}.bin holds {size} bytes, not a whole number of {dtype} ids. Write it again")
        splits[name] = Split(tokens=size // width, documents=None, text_bytes=None, sha256=None)
    return TokenDirectory(
        path=path, vocab_size=vocabulary_size(loaded), dtype=dtype,
        end_of_text=end_of_text_id(loaded, folder_of(tokenizer)), tokenizer_hash=tokenizer_hash(loaded), splits=splits,
        tokenizer_source=tokenizer, source={},
    )  # fmt: skip


def _check_shards(directory: TokenDirectory) -> None:
    if directory.dtype not in ("uint16", "uint32") or directory.dtype < dtype_for(directory.vocab_size):
        raise CrateError(
            f"{directory.path / 'tokens.json'} says dtype {directory.dtype}, but a vocabulary of "
            f"{directory.vocab_size} needs {dtype_for(directory.vocab_size)}. Tokenize again"
        )
    for name, split in directory.splits.items():
        shard = directory.path / f"{name}.bin"
        if not shard.is_file():
            raise CrateError(f"{shard} is missing, though tokens.json lists it. Tokenize again")
        expected = split.tokens * np.dtype(directory.dtype).itemsize
        if shard.stat().st_size != expected:
            raise CrateError(
                f"{shard} must have {expected} bytes ({split.tokens} ids of {directory.dtype}) by tokens.json, "
                f"got {shard.stat().st_size}. Tokenize again"
            )


def tokenize(
    sources: Sequence[str],
    out: Path,
    tokenizer: Tokenizer | str,
    *,
    held_out: float,
    test: float = 0.0,
    seed: int = 0,
    skip_bad: bool = False,
    workers: int | None = None,
    text_field: str = "text",
    begin_token: str | None = None,
    end_token: str | None = None,
    known_end: int | None = None,
) -> TokenDirectory:
    """Write the token directory `out`, or open it if the same call has made it before.

    `tokenizer` may be what `load_tokenizer` reads, or `bpe:N`: a vocabulary of N trained on the training split alone.
    `workers` threads encode (default: one per core, at most 16, where Python's lock is the limit); their number does
    not change the files. Memory stays bounded by the longest document. Documents go to a split by a hash of their text
    and the seed: copies land on one side. `end_token` names the token that follows each document (`choose_end`),
    `begin_token` the token with which a model's rows over these tokens begin. `known_end` is the id of the end token of
    a `Tokenizer` whose files name it.
    """
    shares, files = _checked_shares(held_out, test), fingerprint(sources)
    trains = isinstance(tokenizer, str) and tokenizer.startswith("bpe:")
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) and not trains else tokenizer
    settings: dict[str, Any] = {
        "sources": list(sources), "files": files, "text_field": text_field,
        "tokenizer": loaded if isinstance(loaded, str) else tokenizer_hash(loaded),
        "held_out": held_out, "test": test, "seed": seed, "skip_bad": skip_bad,
    }  # fmt: skip
    named = {"begin_token": begin_token, "end_token": end_token}  # absent from older directories, which stay valid
    settings |= {name: text for name, text in named.items() if text is not None}
    if _made_before(out, settings):
        remove_leftovers(out)
        return TokenDirectory.open(out)
    skipped = _Skipped()

    def read(what: str, on_bad: Callable[[str], None]) -> contextlib.closing[Generator[Document, None, None]]:
        return contextlib.closing(_with_progress(what, sources, skip_bad, on_bad, text_field))

    if isinstance(loaded, str):
        with read("train the tokenizer", lambda _: None) as documents:
            loaded = train_bpe(_sample(documents, seed, shares), _asked_vocabulary(loaded))
    folder = folder_of(tokenizer) if isinstance(tokenizer, str) and not trains else None
    end = choose_end(loaded, folder, end_token) if known_end is None or end_token is not None else known_end
    description: dict[str, Any] = {
        "tokenizer": "tokenizer.json", "tokenizer_hash": tokenizer_hash(loaded), "end_of_text": end,
        "vocab_size": vocabulary_size(loaded), "dtype": dtype_for(vocabulary_size(loaded)),
    }  # fmt: skip
    if begin_token is not None:
        description["begin_of_text"] = [choose_known(loaded, begin_token, "--begin-token")]
    with atomic_path(out) as folder, read("tokenize", skipped.add) as documents:
        folder.mkdir()
        loaded.save(str(folder / "tokenizer.json"))
        description["tokenizer_sha256"] = sha256_of(folder / "tokenizer.json")
        splits, stream = write_shards(
            documents, folder, loaded, seed, shares, workers or min(os.cpu_count() or 1, 16), end
        )  # fmt: skip
        description["splits"] = {name: asdict(split) for name, split in splits.items()}
        description["source"] = {
            "settings": settings, "documents_sha256": stream, "skipped": skipped.count,
            "skipped_origins": skipped.first, "origin": origin(),
        }  # fmt: skip
        write_json(folder / "tokens.json", description)
    return TokenDirectory.open(out)


def _with_progress(
    what: str, sources: Sequence[str], skip_bad: bool, on_bad: Callable[[str], None], text_field: str
) -> Generator[Document, None, None]:
    with runtime.progress_bar(what, total=float(source_bytes(sources)), done=0.0, unit="B") as bar:
        yield from stream_documents(
            sources,
            skip_bad=skip_bad,
            on_bad=on_bad,
            text_field=text_field,
            on_bytes=lambda count: bar.advance(float(count)),
        )


class _Skipped:
    """How many documents were skipped, and what was wrong with the first 20."""

    def __init__(self) -> None:
        self.count, self.first = 0, list[str]()

    def add(self, problem: str) -> None:
        self.count += 1
        if len(self.first) < 20:
            self.first.append(problem)


def _checked_shares(held_out: float, test: float) -> dict[str, float]:
    if not (0 <= held_out < 1 and 0 <= test < 1 and held_out + test < 1):
        raise CrateError(f"--held-out and --test must be at least 0 and below 1 together, got {held_out} and {test}")
    return {name: share for name, share in (("val", held_out), ("test", test)) if share > 0}


def _made_before(out: Path, settings: Mapping[str, Any]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "tokens.json").is_file():
        raise CrateError(f"{out} exists and is not a token directory. Give another --out")
    earlier = read_json(out / "tokens.json", made_by="cratelm tokenize").get("source", {}).get("settings", {})
    named, asked = (list(map(os.path.abspath, each.get("sources", ()))) for each in (earlier, settings))
    if named == asked:  # texts and texts/ are one folder
        settings = {**settings, "sources": earlier["sources"], "files": fingerprint(earlier["sources"])}
    if earlier != settings:
        raise CrateError(
            f"{out} has other tokens ({differing_fields(earlier, settings)}). Remove it or give another --out"
        )
    return True


def _asked_vocabulary(name: str) -> int:
    number = name.removeprefix("bpe:")
    if not number.isdecimal():
        raise CrateError(f"--tokenizer bpe:N needs a vocabulary size, got {name}. Write for example bpe:4096")
    return int(number)


def _sample(documents: Iterator[Document], seed: int, shares: Mapping[str, float]) -> Iterator[Document]:
    characters = 0
    for document in documents:
        if split_of(document.text, seed=seed, shares=shares) == "train":
            characters += len(document.text)
            yield document
        if characters >= BPE_TRAINING_CHARACTERS:
            return


def sample_batch(
    tokens: UInt[np.ndarray, " tokens"], *, seed: int, step: int, rows: range, context: int
) -> tuple[Int64[np.ndarray, "rows context"], Int64[np.ndarray, "rows context"]]:
    """Inputs and targets of the given rows of a step's batch: windows at uniform offsets of the stream.

    The offset of a row is a function of (seed, step, row) alone, so any number of processes or of accumulation steps
    reads the same data, and a resumed run continues with the next batch. Windows cross documents, as in the paper.
    """
    choices = len(tokens) - context
    if choices < 1:
        raise CrateError(
            f"a context of {context} needs at least {context + 1} tokens, got {len(tokens)}. "
            "Give more text or a shorter context"
        )
    key = _mix(_mix(np.array([seed % 2**64], dtype=np.uint64)) ^ np.uint64(step))
    counters = np.arange(rows.start, rows.stop, rows.step, dtype=np.uint64)
    offsets = (_mix(key ^ counters) % np.uint64(choices)).astype(np.int64)
    windows = tokens[offsets[:, None] + np.arange(context + 1)].astype(np.int64)
    return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])


def _mix(value: UInt[np.ndarray, " values"]) -> UInt[np.ndarray, " values"]:
    """One step of splitmix64: neighbouring counters give independent 64-bit numbers."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
