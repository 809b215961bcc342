"""Tokenizers: train a byte-level BPE, read GPT-2's BPE or any `tokenizer.json`, show tokens as text."""

import contextlib
import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from cratelm.checksums import verify
from cratelm.data.converted_tokenizer import converted
from cratelm.data.special_tokens import END_OF_TEXT, NAMING_FILES, NUMBERING_FILES
from cratelm.data.text import Document
from cratelm.errors import CrateError
from cratelm.gguf_files import is_gguf, model_directory
from cratelm.rundir import check_regular, read_json

LONGEST_WORD = 1000
"""Longest word, or run of spaces, from which a byte-level BPE learns merges; ordinary text has no longer ones."""
_LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD + 1},}}|\s{{{LONGEST_WORD + 1},}}")

LARGEST_VOCABULARY = 1 << 22
"""Bound of token ids, eight times those of any known tokenizer: tables are as long as the largest id."""

_GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + rank): byte for rank, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}
"""GPT-2's characters for bytes: printable Latin-1 as it is, the other 68 bytes from 256 on."""


def train_bpe(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's way of cutting text into words. The same documents give the same tokenizer.

    `vocab_size` counts the 256 bytes and `<|endoftext|>` (id 0); a small corpus may give fewer. A word is cut every
    `LONGEST_WORD` letters, because training takes time in proportion to its square. Ctrl-C interrupts at once.
    """
    if vocab_size < 257:
        raise CrateError(f"a vocabulary of {vocab_size} is too small: 256 bytes and {END_OF_TEXT} make 257. Give more")
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (piece for document in documents for piece in _without_long_words(document.text))
    _interruptible(lambda texts: tokenizer.train_from_iterator(texts, trainer), texts)
    return tokenizer


def _without_long_words(text: str) -> Iterator[str]:
    """The text in pieces, each cut inside of a word that is too long; a text without such a word is one piece."""
    start = 0
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)  # the tokenizer's is locked while it is trained
    if _LONG_RUN.search(text):
        for _, (begin, end) in words.pre_tokenize_str(text):
            for at in range(begin + LONGEST_WORD, end, LONGEST_WORD):
                yield text[start:at]
                start = at
    yield text[start:]


def _interruptible(work: Callable[[Iterator[str]], object], texts: Iterator[str]) -> None:
    """Let a thread work on the texts: code in Rust does not notice Ctrl-C, which the main thread does."""
    stopped, read, done, failures = threading.Event(), threading.Event(), threading.Event(), list[BaseException]()

    def feed() -> Iterator[str]:
        try:
            for text in texts:
                if stopped.is_set():
                    raise InterruptedError
                yield text
        finally:
            read.set()

    def run() -> None:
        try:
            work(feed())
        except BaseException as error:
            failures.append(error)
        finally:
            read.set()
            done.set()

    try:
        threading.Thread(target=run, daemon=True).start()
        while not done.wait(0.2):
            pass
    except BaseException:
        stopped.set()
        read.wait(5)  # the caller closes the texts, which must not be in use
        done.wait(0.5)  # Rust aborts a process that exits while a thread of Rust returns from reading
        raise
    if failures:
        raise failures[0]


def gpt2_bpe(folder: Path | None = None) -> Tokenizer:
    """GPT-2's BPE from `encoder.json` + `vocab.bpe` (or `vocab.json` + `merges.txt`) in `folder`, else from the hub."""
    if folder is None:
        return _from_json(_fetched("gpt2"))
    for vocab_name, merges_name in _GPT2_FILES:
        if (folder / vocab_name).is_file() and (folder / merges_name).is_file():
            return _from_vocab_and_merges(folder / vocab_name, folder / merges_name)
    wanted = " or ".join(" + ".join(pair) for pair in _GPT2_FILES)
    raise CrateError(f"{folder} has no GPT-2 tokenizer. It needs {wanted}")


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`, a folder holding one (or GPT-2's two files), a GGUF file, `gpt2`, or a hub name.

    A folder that holds only a SentencePiece `tokenizer.model` is converted, which needs the extra `hf`.
    """
    path = find_tokenizer(source)
    if path.is_file():
        return _from_json(path)
    if (path / "tokenizer.model").is_file():
        return converted(path)
    return gpt2_bpe(path)


def find_tokenizer(source: str | Path) -> Path:
    """The tokenizer.json or the folder that a source of `load_tokenizer` names; from the hub it is fetched."""
    path = Path(source)
    if is_gguf(path) and not path.is_dir():
        path = model_directory(path)
    if (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    if path.exists():
        return path
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) and path.suffix != ".json":
        return _fetched(source)
    raise CrateError(
        f"tokenizer {source} does not exist. Give a tokenizer.json, its folder, gpt2, or bpe:4096 to train one"
    )


def folder_of(source: str | Path) -> Path:
    """The folder of a tokenizer, where files may name its special tokens."""
    path = find_tokenizer(source)
    return path if path.is_dir() else path.parent


def without_fixed_lengths(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without the truncation and padding that some files store: both would change a text's tokens."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: ids may have holes, and a table indexed by id must reach the last."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= LARGEST_VOCABULARY:
        raise CrateError(f"the ids of a tokenizer must be below {LARGEST_VOCABULARY:,}, got {largest:,}")
    return 1 + largest


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """The sha256 of all settings that affect the ids of a text, independent of how the tokenizer was stored.

    Truncation, padding, post-processor, decoder and empty options do not affect it.
    """
    layout = _layout(tokenizer)
    added = sorted((token["id"], token["content"]) for token in layout["added_tokens"])
    deciding = {key: _without_nothing(layout[key]) for key in ("normalizer", "pre_tokenizer", "model")}
    text = json.dumps({**deciding, "added_tokens": added}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of text of each id, which need not be valid UTF-8; empty for an id without a token."""
    layout = _layout(tokenizer)
    kinds = set(_kinds([layout["decoder"], layout["pre_tokenizer"]]))
    added = {token["id"]: token["content"] for token in layout["added_tokens"]}
    strings = [b""] * vocabulary_size(tokenizer)
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        strings[index] = added[index].encode() if index in added else _plain_bytes(token, kinds)
    return strings


def token_strings(tokenizer: Tokenizer) -> list[str]:
    r"""Text of each id for display: ` the` with its space, `\xe2` for a byte that is not a whole character."""
    return [text.decode(errors="backslashreplace") for text in token_bytes(tokenizer)]


def _plain_bytes(token: str, kinds: set[str]) -> bytes:
    if "ByteLevel" in kinds and all(letter in _BYTE_OF for letter in token):
        return bytes(_BYTE_OF[letter] for letter in token)
    if "ByteFallback" in kinds and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes.fromhex(token[3:5])
    return (token.replace("▁", " ") if kinds & {"Metaspace", "ByteFallback"} else token).encode()


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _from_vocab_and_merges(vocab_path: Path, merges_path: Path) -> Tokenizer:
    try:
        vocab = read_json(vocab_path, hint="Fetch it again")
        lines = check_regular(merges_path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CrateError(f"{vocab_path.parent} holds no readable GPT-2 tokenizer ({error}). Fetch it again") from None
    merges = [
        (first, second) for first, _, second in (line.partition(" ") for line in lines if line[:9] != "#version:")
    ]
    merges = [pair for pair in merges if all(pair)]
    for first, second in merges:
        if not {first, second, first + second} <= vocab.keys():
            raise CrateError(
                f"{merges_path} joins {first} {second}, which {vocab_path} does not know. Fetch both again"
            )
    tokenizer = _byte_level(models.BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    return tokenizer


def _from_json(path: Path) -> Tokenizer:
    verify(path)
    try:
        return without_fixed_lengths(Tokenizer.from_str(check_regular(path).read_text(encoding="utf-8")))
    except Exception as error:  # the library raises a bare Exception for every fault of the content
        if type(error) not in (Exception, UnicodeDecodeError):
            raise
        raise CrateError(
            f"{path} is not a readable tokenizer ({error}). Give a file of the library tokenizers"
        ) from None


def _fetched(name: str) -> Path:
    """The tokenizer.json of a name on the hub, with the files that name its special tokens next to it."""
    # Only this path needs the hub's client, which takes a tenth of a second to import.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it logs each of five retries on an offline machine
    try:
        path = Path(hf_hub_download(name, "tokenizer.json"))
        for file in (*NAMING_FILES, *NUMBERING_FILES):
            with contextlib.suppress(OSError, ValueError, EntryNotFoundError):
                hf_hub_download(name, file)
        return path
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise CrateError(
            f"tokenizer {name} is not a local file and could not be fetched from the hub ({type(error).__name__}). "
            "Give the folder of a tokenizer.json or of encoder.json + vocab.bpe, or train one with bpe:4096"
        ) from error
    finally:
        logger.setLevel(level)


def _layout(tokenizer: Tokenizer) -> dict[str, Any]:
    layout: dict[str, Any] = json.loads(tokenizer.to_str())
    return layout


def _kinds(value: Any) -> Iterator[str]:
    """Every `type` named anywhere inside a part of a tokenizer."""
    for part in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        yield from _kinds(part)
    if isinstance(value, dict) and "type" in value:
        yield value["type"]


def _without_nothing(value: Any) -> Any:
    """Drop options that are null, zero, false or empty, and those that affect offsets only; keep the vocabulary."""
    if isinstance(value, list):
        return [_without_nothing(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        key: option if key == "vocab" else _without_nothing(option)
        for key, option in value.items()
        if option not in (None, False, "") and key != "trim_offsets"
    }
