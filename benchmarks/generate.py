"""Generation with the cache against a loop that reads the prefix again and takes the last position's logits.

    python benchmarks/generate.py [--size s] [--prompt 512] [--tokens 512] [--rounds 1] [--threads 1 --cpu-time]

Batch 1, context 1024, greedy, float32 on the CPU, CRATE and GPT-2; the two ways in turns. Ends with the caches' bytes.
"""

import argparse
import statistics
import time
from typing import get_args

import torch

from cratelm.model.config import SIZES, Architecture, sized
from cratelm.model.generate import Cache
from cratelm.model.language_model import LanguageModel


def main() -> None:
    """Read the flags and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="s", choices=SIZES)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, help="all by default")
    parser.add_argument("--cpu-time", action="store_true", help="of this process: for one thread on a busy machine")
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    clock = time.process_time if flags.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, size {flags.size}, "
          f"{flags.prompt} + {flags.tokens} tokens")  # fmt: skip
    for arch in get_args(Architecture):
        model = LanguageModel(sized(arch, flags.size)).initialise(0).eval()
        prompt = torch.randint(model.config.vocab_size, (1, flags.prompt), generator=torch.Generator().manual_seed(0))
        model.generate(prompt, 2, temperature=0)
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(flags.rounds):
            texts = []
            for use_cache in (True, False):
                started = clock()
                texts.append(model.generate(prompt, flags.tokens, temperature=0, use_cache=use_cache))
                times[use_cache].append(clock() - started)
            same = (texts[0] == texts[1]).all().item()
        cached, again = (statistics.median(times[use_cache]) for use_cache in (True, False))
        cache = Cache(model.config, batch=1, capacity=1024, device=model.device, dtype=torch.float32)
        print(
            f"{arch:<6} cached {flags.tokens / cached:6.1f} tok/s   recomputed {flags.tokens / again:6.2f} tok/s   "
            f"{again / cached:5.1f}x   same text: {same}   cache {cache.nbytes / 2**20:.1f} MiB"
        )


if __name__ == "__main__":
    main()
