"""Simulating with a model in the process: excerpts in batches behind a shared beginning against one at a time.

    OMP_NUM_THREADS=1 python benchmarks/simulate.py [--width 256] [--layers 4] [--neurons 3] [--device cpu]

A Llama of random weights with a byte-level BPE simulates neurons all at once, 10 excerpts of 64 tokens each as the
protocol top-and-random has them, or 47 of 8 as anthropic. One at a time is the same prompts, each computed whole. Both
are timed in processor time (of all threads) and wall time; the ratio that token counts predict stands beside.
"""

import argparse
import asyncio
import time
from collections.abc import Callable

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cratelm.interpretation.llm import Prompt
from cratelm.interpretation.prompts.few_shot import few_shot_neurons
from cratelm.interpretation.prompts.simulator import FILE, all_at_once_prefix, all_at_once_rows
from cratelm.local_llm import LocalLLM
from cratelm.shared_prefix.reader import TextToRead

PROTOCOLS = {"T=64": (10, 64), "T=8": (47, 8)}
"""Excerpts of a neuron, and tokens of each."""
TEXT = "the of and to in a is that for it was on are as with they at be this from have or by one had not but"
WORDS = TEXT.split()


def make_llm(width: int, layers: int, vocabulary: int, device: str, dtype: str) -> LocalLLM:
    """A random model of these sizes; its tokenizer knows the words of the prompts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    solved = "".join(token for neuron in few_shot_neurons() for record in neuron.records for token in record.tokens)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([FILE.read_text() * 2, solved * 2, "unknown\t10\n" * 9, f" {TEXT}" * 3], trainer)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1), max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device, getattr(torch, dtype)).eval()
    return LocalLLM(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer), name="random")


def prompts(explanation: str, excerpts: int, width: int, rng: np.random.Generator) -> list[Prompt]:
    """The prompts of one neuron."""
    prefix = all_at_once_prefix(explanation, few_shot_neurons(), top=10, unknown="unknown")
    found = []
    for _ in range(excerpts):
        rest, places = all_at_once_rows([f" {word}" for word in rng.choice(WORDS, width)], unknown="unknown")
        found.append(Prompt(prefix=prefix, rest=rest, at=places))
    return found


def timed(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Processor time and wall time of some work, in seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() - processor, time.perf_counter() - wall


def measure(llm: LocalLLM, excerpts: int, width: int, neurons: int, alone: int, device: str) -> dict[str, float]:
    """Seconds per excerpt both ways, and the tokens computed."""
    rng = np.random.default_rng(0)
    asked = [one for i in range(neurons + 1) for one in prompts(f"words for things of kind {i}", excerpts, width, rng)]
    warm, asked = asked[:excerpts], asked[excerpts:]
    asyncio.run(llm.prompt_logprobs(warm))  # what all neurons have in common is there from the first on
    before = llm.reader.tokens_computed
    processor, wall = timed(lambda: asyncio.run(llm.prompt_logprobs(asked)), device)
    tokens = (llm.reader.tokens_computed - before) / len(asked)

    def one_at_a_time() -> None:
        for one in asked[:alone]:
            row = llm._tokenizer.tokenize(one).row
            llm.reader.read([TextToRead(tokens=row.tokens, shared=0, at=row.at)], top=15)

    before = llm.reader.tokens_computed
    alone_processor, alone_wall = timed(one_at_a_time, device)
    return {
        "tokens": tokens, "alone_tokens": (llm.reader.tokens_computed - before) / alone,
        "processor": processor / len(asked), "alone_processor": alone_processor / alone,
        "wall": wall / len(asked), "alone_wall": alone_wall / alone,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 256), ("layers", 4), ("neurons", 3), ("alone", 10), ("vocabulary", 8000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens-at-once", type=int, default=0)
    options = parser.parse_args()
    llm = make_llm(options.width, options.layers, options.vocabulary, options.device, options.dtype)
    llm.reader.tokens_at_once = options.tokens_at_once or llm.reader.tokens_at_once
    print(f"width {options.width}, {options.layers} layers, {options.device}, {options.dtype}, "
          f"{torch.get_num_threads()} threads, {llm.reader.tokens_at_once} tokens at once")  # fmt: skip
    print(f"{'':6}{'tokens':>8}{'alone':>8}{'predicted':>11}{'processor':>11}{'reached':>9}{'wall':>7}{'reached':>9}"
          f"{'ms/excerpt':>12}")  # fmt: skip
    for name, (excerpts, width) in PROTOCOLS.items():
        found = measure(llm, excerpts, width, options.neurons, options.alone, options.device)
        predicted = found["alone_tokens"] / found["tokens"]
        ratios = [found[f"alone_{kind}"] / found[kind] for kind in ("processor", "wall")]
        print(f"{name:6}{found['tokens']:8.0f}{found['alone_tokens']:8.0f}{predicted:10.1f}x"
              f"{ratios[0]:10.1f}x{ratios[0] / predicted:9.0%}{ratios[1]:6.1f}x{ratios[1] / predicted:9.0%}"
              f"{1000 * found['processor']:12.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
