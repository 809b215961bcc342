"""Cost of training: CRATE against the naive form, this project's GPT-2, and `transformers`' where that is installed.

    python benchmarks/train_step.py                       ISTA block and whole step of size b, d=768, T=1024, float32
    python benchmarks/train_step.py --scaling             cost as sequence, width and depth grow
    python benchmarks/train_step.py --compiled            the step as it is and through torch.compile
    python benchmarks/train_step.py --floor               FLOPs and bytes of a step by arithmetic, nothing is run
    python benchmarks/train_step.py --gpu                 bfloat16 on CUDA, rates of the model's own shapes beside

`--threads 1 --cpu-time` is for a machine that does other work, where seconds on the wall mean little.

Everything compared is measured in this one run in turns (A B C A B C ...) and the median taken, so what else the
machine does touches all alike. The naive form is the released code's: five products for two steps, autograd on the
formulas as written, all logits at once.
"""

import argparse
import copy
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cratelm.model.config import SIZES, ModelConfig, sized
from cratelm.model.crate import ISTA
from cratelm.model.language_model import LanguageModel

Work = Callable[[], object]


class NaiveISTA(nn.Module):
    """The released arithmetic: D^T x twice."""

    def __init__(self, ista: ISTA) -> None:
        super().__init__()
        self.atoms, self.neurons = ista.atoms, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Two steps of size 0.1 with penalty 0.1."""
        code = F.relu(0.1 * F.linear(x, self.atoms) - 0.01)
        gradient = F.linear(x, self.atoms) - F.linear(code @ self.atoms, self.atoms)
        return self.neurons(F.relu(code + 0.1 * gradient - 0.01)) @ self.atoms


class NaiveCrate(nn.Module):
    """Our CRATE with the naive ISTA and all logits at once."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        for block in self.model.blocks:
            block.ista = NaiveISTA(block.ista)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self.model(tokens).flatten(0, 1).float(), targets.flatten())


class Transformers(nn.Module):
    """`transformers`' GPT-2 of the same size, ReLU, no dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size, n_positions=config.context_length, n_embd=config.d_model,
                n_layer=config.num_layers, n_head=config.num_heads, activation_function="relu", resid_pdrop=0.0,
                embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            )
        )  # fmt: skip

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self.model(tokens).logits.flatten(0, 1).float(), targets.flatten())


@dataclass(frozen=True, kw_only=True, slots=True)
class Meter:
    """Measures pieces of work in turns."""

    device: torch.device
    rounds: int
    clock: Callable[[], float]

    def in_turns(self, work: dict[str, Work], *, times: int = 1) -> dict[str, float]:
        """Median seconds of each piece, of `times * rounds`; one more round warms up."""
        taken: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(times * self.rounds + 1):
            for name, call in work.items():
                self.wait()
                started = self.clock()
                call()
                self.wait()
                if turn:
                    taken[name].append(self.clock() - started)
        return {name: statistics.median(seconds) for name, seconds in taken.items()}

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def block_work(tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> dict[str, Work]:
    """Forward and backward of one ISTA block, and of the naive form on the same weights."""
    config = ModelConfig(arch="crate", num_layers=1, d_model=width, num_heads=1, vocab_size=1)
    ista = ISTA(config)
    nn.init.uniform_(ista.atoms, -((6 / width) ** 0.5), (6 / width) ** 0.5)
    ista = ista.to(device, dtype)
    x = torch.randn(1, tokens, width, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(x)
    naive: Callable[[Tensor], Tensor] = NaiveISTA(ista)
    ours: Callable[[Tensor], Tensor] = ista
    if device.type == "cuda":
        naive, ours = torch.compile(naive), torch.compile(ours)

    def run(block: Callable[[Tensor], Tensor]) -> None:
        x.grad = ista.atoms.grad = None
        block(x).backward(gradient)

    return {"naive": lambda: run(naive), "ours": lambda: run(ours)}


def step_work(model: nn.Module, config: ModelConfig, batch: int, device: torch.device) -> Work:
    """One optimizer step: forward, backward, clip, AdamW."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss: Callable[[Tensor, Tensor], Tensor] = model.loss  # type: ignore[assignment]
    if device.type == "cuda":
        loss = torch.compile(loss)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(config.vocab_size, (batch, config.context_length + 1), generator=generator).to(device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            value = loss(draws[:, :-1], draws[:, 1:])
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def product_work(m: int, k: int, n: int, device: torch.device, dtype: torch.dtype) -> Work:
    """Ten matrix products of these shapes: what the machine can do at that moment."""
    left, right = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)

    def ten() -> None:
        for _ in range(10):
            torch.mm(left, right, out=out)

    return ten


def causal_flops(config: ModelConfig) -> int:
    """Forward FLOPs per token with attention counted causal: a query meets (T + 1) / 2 keys on average."""
    length = config.context_length
    return config.flops_per_token(length) - config.num_layers * 2 * (length - 1) * config.d_model


def steps(size: str, batch: int, context: int, meter: Meter, product: tuple[Work, float]) -> None:
    """Print one table: whole steps of a size, everything relative to CRATE. `product` is work and its FLOPs."""
    crate = sized("crate", size, context_length=context)  # type: ignore[arg-type]
    gpt2 = sized("gpt2", size, context_length=context)  # type: ignore[arg-type]
    layers = round((crate.num_parameters - gpt2.num_parameters) / layer_parameters(gpt2)) + gpt2.num_layers
    same = replace(gpt2, num_layers=max(1, layers))
    model = LanguageModel(crate).initialise(0)
    subjects: dict[str, tuple[nn.Module, ModelConfig]] = {
        "CRATE": (model, crate),
        "CRATE, naive form": (NaiveCrate(model), crate),
        "GPT-2, same size": (LanguageModel(gpt2).initialise(0), gpt2),
        f"GPT-2, {same.num_layers} layers: same parameters": (LanguageModel(same).initialise(0), same),
    }
    try:
        subjects["transformers' GPT-2"] = (Transformers(gpt2), gpt2)
    except ImportError:
        print("transformers is not installed: its GPT-2 is left out")
    work = {name: step_work(module, config, batch, meter.device) for name, (module, config) in subjects.items()}
    seconds = meter.in_turns(work | {"product": product[0]})
    peak = product[1] / seconds.pop("product")
    tokens = batch * context
    print(f"\nstep of size {size}: {batch} x {context} tokens, median of {meter.rounds}")
    print(f"100 % MFU is what products ran at meanwhile, {peak / 1e9:,.0f} GFLOP/s")
    print(f"{'':<40}{'ms':>9}{'tok/s':>9}{'GFLOP/tok':>11}{'MFU':>6}{'peak MiB':>10}{'time / CRATE':>14}")
    for name, taken in seconds.items():
        flops = 3 * causal_flops(subjects[name][1])
        memory = peak_memory(work[name], meter.device)
        print(
            f"{name:<40}{1e3 * taken:>9.0f}{tokens / taken:>9.0f}{flops / 1e9:>11.3f}"
            f"{flops * tokens / taken / peak:>6.0%}{memory:>10}{taken / seconds['CRATE']:>14.2f}"
        )


def peak_memory(step: Work, device: torch.device) -> str:
    """What one step adds to the memory in use before it, in MiB; on a CPU counted from torch's allocations."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return f"{peak / 2**20:.0f}"


def layer_parameters(config: ModelConfig) -> int:
    """Trainable numbers of one more layer."""
    return replace(config, num_layers=config.num_layers + 1).num_parameters - config.num_parameters


def scaling(meter: Meter) -> None:
    """Print how a step's time grows, from width 256, 4 layers, 256 tokens."""
    start = {"num_layers": 4, "d_model": 256, "context_length": 256}
    grown = {"context_length": (128, 256, 512, 1024), "d_model": (128, 256, 512), "num_layers": (2, 4, 8)}
    print(f"\nms of one step of one sequence, vocabulary of 4096, from {start}")
    for field, values in grown.items():
        for value in values:
            work = {}
            for arch in ("crate", "gpt2"):
                shape = start | {field: value}
                config = ModelConfig(arch=arch, num_heads=shape["d_model"] // 32, vocab_size=4096, **shape)  # type: ignore[arg-type]
                work[arch] = step_work(LanguageModel(config).initialise(0), config, 1, meter.device)
            taken = meter.in_turns(work)
            print(
                f"{field:<15}{value:>6}   CRATE {1e3 * taken['crate']:>7.1f}   GPT-2 {1e3 * taken['gpt2']:>7.1f}"
                f"   ratio {taken['crate'] / taken['gpt2']:.2f}"
            )


def compiled(meter: Meter) -> None:
    """Print what torch.compile gives a step, for a small size and for size s."""
    for size, batch, context, vocab in (("2l", 8, 256, 4096), ("s", 1, 1024, 50304)):
        for arch in ("crate", "gpt2"):
            config = sized(arch, size, vocab_size=vocab, context_length=context)  # type: ignore[arg-type]
            model = LanguageModel(config).initialise(0)
            fused = copy.deepcopy(model)
            fused.loss = torch.compile(fused.loss)  # type: ignore[method-assign]
            work = {
                name: step_work(one, config, batch, meter.device) for name, one in (("as", model), ("fused", fused))
            }
            taken = meter.in_turns(work)
            print(
                f"{arch:<6}{size:<3} {batch} x {context}: {1e3 * taken['as']:.0f} ms as it is, "
                f"{1e3 * taken['fused']:.0f} ms compiled, {taken['as'] / taken['fused']:.2f}x"
            )


def floor() -> None:
    """Print the least a training step can do: FLOPs, and bytes of weights, optimizer and activations."""
    print("per token: GFLOP forward + backward (attention causal, context 1024), of which the head; naive CRATE")
    print("per step: GB of traffic for weights and AdamW (float32: w r, g w + r, m r + w, v r + w, w w = 8 x 4 bytes)")
    print("per token: KB kept for the backward pass in float32, all layers; CRATE with recompute")
    print(f"{'':<12}{'GFLOP/tok':>10}{'head':>7}{'naive':>8}{'GB/step':>9}{'KB/tok':>8}{'recompute':>11}")
    for size in SIZES:
        for arch in ("crate", "gpt2"):
            config = sized(arch, size)  # type: ignore[arg-type]
            d, h, layers = config.d_model, config.num_neurons, config.num_layers
            total = 3 * causal_flops(config)
            naive = total + layers * 3 * 2 * h * d if arch == "crate" else total
            weights = 8 * 4 * (config.num_parameters + config.context_length * d)
            # CRATE: x, LN(x), w, heads' output, z, LN(z) * eta, r * eta, a1, a2.  GPT-2: q k v instead of w, one code.
            kept, again = (7 * d + 2 * h, 7 * d + h) if arch == "crate" else (8 * d + h, 8 * d + h)
            print(
                f"{arch + ' ' + size:<12}{total / 1e9:>10.3f}{6 * config.vocab_size * d / 1e9:>7.3f}{naive / 1e9:>8.3f}"
                f"{weights / 1e9:>9.2f}{4 * layers * kept / 1e3:>8.0f}{4 * layers * again / 1e3:>11.0f}"
            )


def main() -> None:
    """Read the flags, run what they ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="b", choices=SIZES)
    parser.add_argument("--batch", type=int, help="sequences per step: 1, with --gpu 64")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the CPU; all by default")
    parser.add_argument("--cpu-time", action="store_true", help="of this process: for one thread on a busy machine")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--floor", action="store_true")
    flags = parser.parse_args()
    if flags.floor:
        floor()
        return
    if flags.threads:
        torch.set_num_threads(flags.threads)
    device = torch.device("cuda" if flags.gpu else "cpu")
    dtype = torch.bfloat16 if flags.gpu else torch.float32
    meter = Meter(device=device, rounds=flags.rounds, clock=time.process_time if flags.cpu_time else time.perf_counter)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {dtype}")
    if flags.scaling:
        scaling(meter)
        return
    if flags.compiled:
        compiled(meter)
        return
    batch = flags.batch or (64 if flags.gpu else 1)
    tokens = batch * flags.context
    m, k, n = (65_536, 768, 3072) if flags.gpu else (tokens, 768, 3072)
    product, flops = product_work(m, k, n, device, dtype), 20.0 * m * k * n
    work = block_work(tokens, 768, device, dtype) | {"product": product}
    if flags.gpu:
        work["cube"] = product_work(8192, 8192, 8192, device, dtype)
    taken = meter.in_turns(work, times=2)
    peak = flops / taken["product"]
    print(f"matrix product {m} x {k} x {n}: {peak / 1e9:,.0f} GFLOP/s, which is 100 % MFU")
    if flags.gpu:
        print(f"matrix product 8192^3: {20 * 8192**3 / taken['cube'] / 1e9:,.0f} GFLOP/s")
    share = 24 * tokens * 768 * 3072 / taken["ours"] / peak
    print(
        f"ISTA block forward + backward, d=768, T={tokens}: naive {1e3 * taken['naive']:.1f} ms, "
        f"ours {1e3 * taken['ours']:.1f} ms, {taken['naive'] / taken['ours']:.2f}x; ours at {share:.0%} of the products"
    )
    steps(flags.size, batch, flags.context, meter, (product, flops))
    if not flags.gpu:
        print(f"process peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:,.0f} MiB")


if __name__ == "__main__":
    main()
