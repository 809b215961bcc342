"""Collection against brute force: every activation held, then cut, sorted and sampled by the definitions."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cratelm.activations import collect as collecting
from cratelm.activations.collect import collect
from cratelm.activations.collector import Collector
from cratelm.activations.plan import SPLITS, CollectConfig, make_plan, read_rows
from cratelm.activations.records import ABSENT, LayerRecords, read_collection, read_records
from cratelm.activations.results import layer_arrays
from cratelm.activations.subject import Corpus, Subject
from cratelm.activations.taps import capture
from cratelm.errors import CrateError
from cratelm.model.config import ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.runtime import progress_bar

CPU = torch.device("cpu")
CONTEXT, VOCABULARY = 160, 60
CONFIG = CollectConfig(top_wide=6, top_narrow=7, random=4, sample_wide=12, sample_narrow=40, batch_rows=5)


def make_corpus(rng: np.random.Generator, documents: int = 40) -> Corpus:
    pieces = [np.append(rng.integers(1, VOCABULARY, rng.integers(5, 500)), 0) for _ in range(documents)]
    bounds = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
    tokens = np.concatenate(pieces).astype(np.uint16)
    return Corpus(tokens=tokens, documents=bounds, end_of_text=0, identity={"data_hash": "d"})


def make_subject(seed: int = 0) -> tuple[Subject, LanguageModel]:
    config = ModelConfig(
        arch="crate", num_layers=2, d_model=8, num_heads=2, vocab_size=VOCABULARY, context_length=CONTEXT
    )
    model = LanguageModel(config).initialise(seed).eval()

    def forward(tokens: Tensor) -> Mapping[int, Tensor]:
        with torch.inference_mode(), capture(model, model.neuron_taps) as codes:
            model.features(tokens)
        return {layer: codes[tap] for layer, tap in enumerate(model.neuron_taps)}

    layers = dict.fromkeys(range(2), config.num_neurons)
    identity = {"model_hash": str(seed)}
    return Subject(forward=forward, layers=layers, context=CONTEXT, tap="neurons", identity=identity), model


def run_collection(run: Path, subject: Subject, corpus: Corpus, config: CollectConfig = CONFIG) -> None:
    with progress_bar("collect", total=len(corpus.tokens)) as bar:
        collect(config, subject, corpus, run, device=CPU, bar=bar)


def held_activations(subject: Subject, corpus: Corpus, layer: int) -> np.ndarray:
    """The activation of every measured token at its index in the corpus, NaN elsewhere; one row a forward pass."""
    plan = make_plan(corpus.tokens, corpus.documents, context=CONTEXT)
    held = np.full((len(corpus.tokens), subject.layers[layer]), np.nan, dtype=np.float32)
    for position, length in zip(plan.row_position, plan.row_length, strict=True):
        row = corpus.tokens[max(position, 0) : position + length].astype(np.int64)
        row = np.concatenate([[corpus.end_of_text], row]) if position < 0 else row
        code = subject.forward(torch.from_numpy(row)[None])[layer][0].numpy()
        held[position + plan.warmup : position + length] = code[plan.warmup :]
    return held


def all_windows(corpus: Corpus, width: int) -> list[tuple[int, int, int]]:
    """(document, first, last) of every window, cut again from the definition."""
    result = []
    per_row = (CONTEXT - 4) // 64 * 64
    for document in range(len(corpus.documents) - 1):
        first, last = int(corpus.documents[document]) + 3, int(corpus.documents[document + 1]) - 1
        measured = last - first
        if measured <= 0:
            continue
        for row in range(first, last, per_row):
            inside = min(per_row, last - row)
            count = inside // width or (1 if measured < 64 else 0)
            result += [(document, row + i * width, min(row + (i + 1) * width, row + inside)) for i in range(count)]
    return result


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Subject, Corpus]:
    corpus, (subject, _) = make_corpus(np.random.default_rng(5)), make_subject()
    run = tmp_path_factory.mktemp("collected") / "run"
    run_collection(run, subject, corpus)
    return run, subject, corpus


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("width", [64, 8])
def test_top_excerpts_equal_brute_force(collected: tuple[Path, Subject, Corpus], layer: int, width: int) -> None:
    run, subject, corpus = collected
    held, records = held_activations(subject, corpus, layer), read_records(run, layer)
    halves = records.windows.document_split
    for index, split in enumerate(SPLITS):
        top = records.excerpts(width, split, "top")
        keep = CONFIG.top_wide if width == 64 else CONFIG.top_narrow
        for neuron in range(records.num_neurons):
            best: dict[int, tuple[float, int, int]] = {}
            for document, first, last in all_windows(corpus, width):
                if halves[document] == index:
                    entry = (-float(held[first:last, neuron].max()), first, last)
                    best[document] = min(entry, best.get(document, entry))
            expected = [entry for entry in sorted(best.values()) if entry[0] < 0][:keep]
            result = list(top.of(neuron))
            assert [excerpt.position for excerpt in result] == [first for _, first, _ in expected]
            for excerpt, (_, first, last) in zip(result, expected, strict=True):
                assert np.allclose(excerpt.activations, held[first:last, neuron], atol=1e-6)
                assert np.array_equal(excerpt.tokens, corpus.tokens[first:last])


@pytest.mark.parametrize("width", [64, 8])
@pytest.mark.parametrize("kind", ["random", "quantile"])
def test_sampled_excerpts_are_windows_of_their_half_with_their_true_activations(
    collected: tuple[Path, Subject, Corpus], width: int, kind: str
) -> None:
    run, subject, corpus = collected
    held, records = held_activations(subject, corpus, 1), read_records(run, 1)
    windows = {first: (document, last) for document, first, last in all_windows(corpus, width)}
    for index, split in enumerate(SPLITS):
        excerpts = records.excerpts(width, split, kind)
        for neuron in range(records.num_neurons):
            result = list(excerpts.of(neuron))
            assert len({excerpt.position for excerpt in result}) == len(result) > 3
            for excerpt in result:
                document, last = windows[excerpt.position]
                assert excerpt.document == document
                assert records.windows.document_split[document] == index
                assert np.allclose(excerpt.activations, held[excerpt.position : last, neuron], atol=1e-6)


def test_quantile_excerpts_of_a_stronger_interval_are_stronger(collected: tuple[Path, Subject, Corpus]) -> None:
    records = read_records(collected[0], 0)
    for width, shown in ((64, CONFIG.quantiles_wide), (8, CONFIG.quantiles_narrow - 1)):
        excerpts = records.excerpts(width, "score", "quantile")
        maximum = excerpts.activations.max(axis=2).reshape(records.num_neurons, shown, CONFIG.per_quantile)
        present = excerpts.present.reshape(maximum.shape)
        highest = np.where(present, maximum, -np.inf).max(axis=2)
        lowest = np.where(present, maximum, np.inf).min(axis=2)
        assert (highest[:, :-1] <= lowest[:, 1:]).all()


def test_random_excerpts_are_uniform_over_windows() -> None:
    corpus = make_corpus(np.random.default_rng(6), documents=30)
    windows = [first for _, first, _ in all_windows(corpus, 8)]
    collector_config = CollectConfig(top_wide=2, top_narrow=2, random=10, sample_wide=12, sample_narrow=40)
    plan = make_plan(corpus.tokens, corpus.documents, context=CONTEXT)
    collector = Collector(collector_config, plan, {0: 3000}, device=CPU)
    counts = []
    for which in range(len(SPLITS)):
        total = collector.layout.total(8, which)
        _, number = collector.samples[0, 8, which].wanted(0, total)
        counts.append(np.bincount(number.numpy(), minlength=total) * total / 40 / 3000)
    assert sum(map(len, counts)) == len(windows)
    assert np.allclose(np.concatenate(counts), 1, atol=0.6)


def test_statistics_are_those_of_all_measured_tokens(collected: tuple[Path, Subject, Corpus]) -> None:
    run, subject, corpus = collected
    held, statistics = held_activations(subject, corpus, 0), read_records(run, 0).statistics
    measured = held[~np.isnan(held[:, 0])].astype(np.float64)
    assert read_collection(run)["tokens"] == len(measured)
    assert np.allclose(statistics["density"], (measured > 0).mean(axis=0), atol=1e-6)
    assert np.allclose(statistics["mean"], measured.mean(axis=0), rtol=1e-4)
    assert np.allclose(statistics["variance"], measured.var(axis=0, ddof=1), rtol=1e-3)
    assert np.allclose(statistics["maximum"], measured.max(axis=0), rtol=1e-5)


def tensors(records: LayerRecords) -> dict[str, np.ndarray]:
    return dict(records.arrays) | dict(records.statistics)


def test_a_killed_collection_resumes_and_ends_with_the_same_records(
    collected: tuple[Path, Subject, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, subject, corpus = collected
    monkeypatch.setattr(collecting, "SAVE_SECONDS", 0)
    calls = 0

    def dies_in_the_third_batch(tokens: Tensor) -> Mapping[int, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 4:  # the first call fixes the shift of the moments
            raise KeyboardInterrupt
        return subject.forward(tokens)

    dying = Subject(
        forward=dies_in_the_third_batch,
        layers=subject.layers,
        context=CONTEXT,
        tap="neurons",
        identity=subject.identity,
    )
    with pytest.raises(KeyboardInterrupt):
        run_collection(tmp_path / "run", dying, corpus)
    calls = 10
    run_collection(tmp_path / "run", dying, corpus)
    batches = -(-len(make_plan(corpus.tokens, corpus.documents, context=CONTEXT).row_length) // CONFIG.batch_rows)
    assert calls == 10 + batches - 2, "the first two batches were not read again"
    for layer in subject.layers:
        first, second = tensors(read_records(run, layer)), tensors(read_records(tmp_path / "run", layer))
        assert first.keys() == second.keys()
        for name in first:
            assert np.array_equal(first[name], second[name], equal_nan=True), name


def test_the_same_collection_is_not_done_twice_and_another_is_refused(
    collected: tuple[Path, Subject, Corpus],
) -> None:
    run, subject, corpus = collected
    before = (run / "records" / "fixed" / "records.json").read_bytes()
    run_collection(run, subject, corpus)
    assert (run / "records" / "fixed" / "records.json").read_bytes() == before
    other, _ = make_subject(seed=9)
    with pytest.raises(CrateError, match=r"other settings \(model_hash '0' -> '9'\)"):
        run_collection(run, other, corpus)


def test_settling_a_batch_late_and_adding_up_two_processes_change_nothing(rng: np.random.Generator) -> None:
    corpus, (subject, _) = make_corpus(rng), make_subject()
    plan = make_plan(corpus.tokens, corpus.documents, context=CONTEXT)
    alone, late, first, second = (
        Collector(CONFIG, plan, subject.layers, device=CPU, delay=delay) for delay in (0, 2, 0, 1)
    )
    for one in (alone, late, first, second):
        one.start({layer: torch.ones(1, 20, neurons) for layer, neurons in subject.layers.items()})
    for number, start in enumerate(range(0, len(plan.row_length), 5)):
        rows = slice(start, min(start + 5, len(plan.row_length)))
        tokens = read_rows(corpus.tokens, plan.row_position[rows], int(plan.row_length[start]), 0)
        codes = subject.forward(torch.from_numpy(tokens))
        for one in (alone, late, (first, second)[number % 2]):
            one.update(codes, rows)
    first.merge(second)
    for layer in subject.layers:
        expected = layer_arrays(alone, layer, None)
        for other in (late, first):
            result = layer_arrays(other, layer, None)
            assert all(np.array_equal(result[name], expected[name], equal_nan=True) for name in expected)


def test_too_few_documents_are_refused_and_nothing_is_written(rng: np.random.Generator, tmp_path: Path) -> None:
    corpus, (subject, _) = make_corpus(rng, documents=8), make_subject()
    with pytest.raises(CrateError, match="the half for .* must have at least 7 documents"):
        run_collection(tmp_path / "run", subject, corpus)
    assert not (tmp_path / "run").exists()


def test_an_activation_that_is_not_finite_names_layer_and_document(rng: np.random.Generator, tmp_path: Path) -> None:
    corpus, (subject, model) = make_corpus(rng), make_subject()
    poisoned = int(corpus.tokens[corpus.documents[7] + 30]) if np.diff(corpus.documents)[7] > 40 else 1
    with torch.no_grad():
        model.embedding.weight[poisoned] = torch.nan
    with pytest.raises(CrateError, match=r"layer 0 has an activation that is not finite, in document \d+"):
        run_collection(tmp_path / "run", subject, corpus)


def test_memory_does_not_grow_with_the_corpus(rng: np.random.Generator) -> None:
    """The collector's state has the same size however much it has seen."""
    sizes = []
    for documents in (60, 600):
        corpus, (subject, _) = make_corpus(rng, documents=documents), make_subject()
        plan = make_plan(corpus.tokens, corpus.documents, context=CONTEXT)
        collector = Collector(CONFIG, plan, subject.layers, device=CPU)
        peak = 0
        for start in range(0, len(plan.row_length), 8):
            rows = slice(start, min(start + 8, len(plan.row_length)))
            generator = torch.Generator().manual_seed(start)
            shape = (rows.stop - start, int(plan.row_length[start]), subject.layers[0])
            collector.update({0: torch.relu(torch.randn(shape, generator=generator))}, rows)
            waiting = sum(part.nbytes for top in collector.top.values() for one in top.pending for part in one)
            peak = max(peak, waiting)
        sizes.append(peak + sum(value.nbytes for value in collector.state().values()))
    assert sizes[1] < 1.5 * sizes[0]


def test_absent_excerpts_are_marked(tmp_path: Path) -> None:
    corpus = make_corpus(np.random.default_rng(8))

    def rarely(tokens: Tensor) -> Mapping[int, Tensor]:
        codes = torch.zeros(*tokens.shape, 3)
        codes[..., 1] = (tokens == 5).float() * 2
        codes[..., 2] = ((tokens == 5) & (torch.arange(tokens.shape[1]) % 60 == 59)).float()
        return {0: codes}

    sparse = Subject(forward=rarely, layers={0: 3}, context=CONTEXT, tap="neurons", identity={})
    run_collection(tmp_path / "run", sparse, corpus)
    top = read_records(tmp_path / "run", 0).excerpts(64, "explain", "top")
    assert (top.position[0] == ABSENT).all()
    assert (top.tokens[0] == ABSENT).all()
    assert top.present[1].all()
    assert 0 < top.present[2].sum() < CONFIG.top_wide
