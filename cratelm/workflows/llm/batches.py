"""The batches of one run: which models queue their chats, what waits, and what is submitted."""

from cratelm.interpretation.llm import LLM
from cratelm.interpretation.stages.batches import BatchLLM, collect_batches, submit_batches
from cratelm.interpretation.store.answer_cache import Cached
from cratelm.interpretation.store.batches import BatchRecord, forget_batches, open_batches
from cratelm.interpretation.store.database import Store
from cratelm.runtime import console
from cratelm.workflows.options.language_model import Spending


class RunBatches:
    """The batches of one run. Without `--batch` nothing is queued, but what waits in a batch is not sent again."""

    def __init__(self, store: Store, spending: Spending) -> None:
        self.store, self.spending = store, spending
        self._models: list[tuple[BatchLLM, Cached]] = []

    def forget(self) -> None:
        """Remove the notes of open batches if the user asks for it."""
        if self.spending.forget_batches and not self.spending.dry_run:
            console.print(f"forgotten: {forget_batches(self.store)} batches")

    async def collect(self, *llms: LLM | None) -> None:
        """Put the answers of the models' finished batches into the cache, and print the batches of other models."""
        opened = {id(llm): llm for llm in llms if llm is not None}.values()
        if not opened or self.spending.dry_run:
            return
        for llm in opened:
            await collect_batches(self.store, llm)
        collected = {(llm.batch_api.url, llm.name) for llm in opened if llm.batch_api is not None}
        for record in open_batches(self.store):
            if (record.url, record.model) not in collected:
                console.print(
                    f"batch {record.id or record.file} is not collected: it was submitted to {record.url} for the "
                    f"model {record.model}. Run the command with this URL and model to collect it; if it is lost: "
                    "--forget-batches", soft_wrap=True,
                )  # fmt: skip

    @property
    def open(self) -> list[BatchRecord]:
        """The batches that are not collected; in a part also those of the run."""
        main = [Store(self.store.run)] if self.store.part else []
        return [record for store in (self.store, *main) for record in open_batches(store)]

    @property
    def bound(self) -> tuple[int, int]:
        """Most tokens that open batches read and generate."""
        bounds = [record.bound for record in open_batches(self.store)]
        return sum(read for read, _ in bounds), sum(generated for _, generated in bounds)

    def wrapped(self, llm: LLM) -> LLM:
        """The model, which queues chats if its server is asked for batches."""
        waiting = {key for record in self.open for key in record.requests}
        return BatchLLM(llm, waiting) if llm.batch_api is not None and (waiting or self.spending.batch) else llm

    def add(self, llm: LLM, cached: Cached) -> Cached:
        """Remember the cache of a wrapped model."""
        if isinstance(llm, BatchLLM):
            self._models.append((llm, cached))
        return cached

    def start(self) -> None:
        """Queue chats from now on."""
        for llm, _ in self._models:
            llm.queues, llm.postponed = self.spending.batch, 0

    @property
    def postponed(self) -> int:
        """Requests that were queued, or wait, since `start`."""
        return sum(llm.postponed for llm, _ in self._models)

    async def submit(self) -> bool:
        """Submit all queues. Returns whether the stages should run again."""
        return any([await submit_batches(self.store, cached, llm) for llm, cached in self._models])
