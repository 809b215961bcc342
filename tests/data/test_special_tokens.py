"""What begins a text and what ends a document: post-processors, the files next to a tokenizer, and options."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from cratelm import cli
from cratelm.data.special_tokens import end_of_text_id, special_tokens
from cratelm.data.tokenizer import load_tokenizer
from cratelm.data.tokens import TokenDirectory
from cratelm.errors import CrateError

TEXTS = ["a crate holds rain. the neuron sees light.", "one code keeps sand. a harbour in the rain."]


def byte_level(*special: str) -> Tokenizer:
    """A byte-level BPE with some special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def saved(folder: Path, tokenizer: Tokenizer, **files: dict[str, Any]) -> Path:
    """A folder with the tokenizer and JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
LEFT = {"padding_side": "left"}
OURS = ("eos_token", "unk_token", "pad_token")
CHAT = ("<|endoftext|>", "<|im_end|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")


@pytest.mark.parametrize(
    ("special", "files", "end"),
    [
        (DEEPSEEK, {"tokenizer_config": FAST | {"eos_token": DEEPSEEK[1]}}, DEEPSEEK[1]),
        (("<|im_start|>", "<|im_end|>"), {"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}}, "<|im_end|>"),
        (("[PAD]", "[EOS]"), {"special_tokens_map": {"eos_token": "[EOS]"}}, "[EOS]"),
        (("[A]", "[B]"), {"generation_config": {"eos_token_id": [1, 0]}}, "[B]"),
        (("[A]", "[B]"), {"config": {"eos_token_id": 0}, "tokenizer_config": {"eos_token": "[C]"}}, "[A]"),
        (("<s>", "</s>"), {"tokenizer_config": {"eos_token": "<s>"}}, "</s>"),
        (CHAT, {"tokenizer_config": FAST | LEFT | {"eos_token": CHAT[1], "pad_token": CHAT[0]}}, CHAT[0]),
        (CHAT, {"tokenizer_config": FAST | LEFT | dict.fromkeys(OURS, CHAT[1])}, CHAT[1]),
    ],
)
def test_the_end_of_a_document_is_what_the_files_name(
    special: tuple[str, ...], files: dict[str, Any], end: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path, byte_level(*special), **files)
    tokenizer = load_tokenizer(folder)
    assert end_of_text_id(tokenizer, folder) == tokenizer.token_to_id(end)
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    arguments = ["tokenize", str(source), "--out", str(tmp_path / "tokens"), "--tokenizer", str(folder)]
    assert cli.main([*arguments, "--held-out", "0"]) == 0
    data = TokenDirectory.open(tmp_path / "tokens")
    assert data.end_of_text == tokenizer.token_to_id(end)
    assert len(data.documents("train")) == 3


BEGIN = ("<s>", "</s>")


@pytest.mark.parametrize(
    ("single", "config", "begins"),
    [
        ("<s> $A", {}, True),
        ("<s> $A </s>", {}, True),
        ("$A </s>", {}, False),
        (None, {"bos_token": "<s>", "eos_token": "</s>"}, False),
        (None, {"bos_token": "<s>", "add_bos_token": True}, True),
        (None, {"bos_token": "<s>", "add_bos_token": False}, False),
        ("<s> $A", {"bos_token": "<s>", "add_bos_token": False}, True),  # a tokenizer.json overrides the setting
    ],
)
def test_a_text_begins_as_its_own_tokenizer_begins_it(
    single: str | None, config: dict[str, Any], begins: bool, tmp_path: Path
) -> None:
    tokenizer = byte_level(*BEGIN)
    if single is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(text, tokenizer.token_to_id(text)) for text in BEGIN]
        )
    folder = saved(tmp_path, tokenizer, tokenizer_config=FAST | config)
    special = special_tokens(load_tokenizer(folder), folder)
    assert special.begin == ((tokenizer.token_to_id("<s>"),) if begins else ())
    named = not begins and "bos_token" in config
    assert special.unused_begin == (tokenizer.token_to_id("<s>") if named else None)
    assert special_tokens(load_tokenizer(folder), folder, post_processor=False).begin == (
        special.begin if config.get("add_bos_token") else ()
    )
    if single is not None:  # transformers applies add_bos_token only where it converts a tokenizer
        transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
        theirs = transformers.AutoTokenizer.from_pretrained(folder)("a crate").input_ids
        plain = tokenizer.encode("a crate", add_special_tokens=False).ids
        assert theirs[: len(special.begin) + len(plain)] == [*special.begin, *plain]


def test_a_tokenizer_that_stores_a_length_reads_texts_whole(tmp_path: Path) -> None:
    tokenizer = byte_level("<|endoftext|>")
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    loaded = load_tokenizer(saved(tmp_path, tokenizer))
    assert loaded.decode(loaded.encode(TEXTS[0]).ids) == TEXTS[0]
    assert special_tokens(loaded).begin == ()


def test_a_letter_tokenizer_without_special_tokens_gets_an_end_by_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    letters = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(sorted(set("".join(TEXTS))))}))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = saved(tmp_path / "letters", letters)
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    arguments = ["tokenize", str(source), "--out", str(tmp_path / "tokens"), "--tokenizer", str(folder)]
    arguments += ["--held-out", "0"]
    assert cli.main(arguments) == 2
    assert "Hint: name the token that ends a document with --end-token" in " ".join(capsys.readouterr().err.split())
    assert cli.main([*arguments, "--end-token", "a"]) == 2
    assert "gives 'a', the end of a document, for ordinary text" in " ".join(capsys.readouterr().err.split())
    assert cli.main([*arguments, "--end-token", "<end>"]) == 0
    data = TokenDirectory.open(tmp_path / "tokens")
    assert data.end_of_text == letters.get_vocab_size()
    assert data.tokenizer().id_to_token(data.end_of_text) == "<end>"
    arguments[3] = str(tmp_path / "others")
    assert cli.main([*arguments, "--end-token", "<end>", "--begin-token", "<none>"]) == 2
    assert "--begin-token must be a token of the tokenizer, got '<none>'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("begins", [True, False])
def test_a_sentencepiece_model_alone_is_converted(begins: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed (extra hf)")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts.txt"), model_prefix=str(tmp_path / "spm"), vocab_size=300, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "spm.model").rename(folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": begins}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in (*TEXTS, "漢 😀"):
        assert tokenizer.encode(text, add_special_tokens=False).ids == reference.encode(text)
    special = special_tokens(tokenizer, folder)
    assert (special.begin, special.end) == ((1,) if begins else (), 2)
    theirs = transformers.AutoTokenizer.from_pretrained(folder).encode("rain")
    assert theirs == [*special.begin, *tokenizer.encode("rain", add_special_tokens=False).ids]
    (folder / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CrateError, match=r"tokenizer.model is not a tokenizer that transformers converts"):
        load_tokenizer(folder)
