"""Print the prompt with which a neuron is explained, as the model reads it."""

from cratelm.errors import CrateError
from cratelm.interpretation.clients.usage import Usage
from cratelm.interpretation.explainers.explanation import unexplained
from cratelm.interpretation.explainers.language_model import LLMExplainer
from cratelm.interpretation.llm import LLM, Message
from cratelm.interpretation.prompts.explainer import PromptTooLong
from cratelm.interpretation.stages.set_task import SetTask
from cratelm.runtime import console
from cratelm.workflows.llm.opening import calibrate_counts, open_llms
from cratelm.workflows.llm.request import InterpretRequest
from cratelm.workflows.llm.run_work import RunWork
from cratelm.workflows.options.selection import check_runs

NO_TEMPLATE = "the server applies its chat template to these turns and does not return the result"


async def show_prompt(request: InterpretRequest, neuron: int) -> None:
    """Print the prompt of a neuron in the first chosen layer and protocol of each run. Nothing is stored.

    `request` is that of a dry run.
    """
    runs, usage = check_runs(request.selection), Usage()
    request.check(runs)
    async with open_llms(request.explaining, None, request.spending, usage) as llms:
        for run in runs:
            work = RunWork(request=request, run=run, llms=llms, usage=usage)
            await calibrate_counts(llms.explainer, work.store, usage)
            work.request = await work.settle_prompt()
            if not isinstance(work.explainer, LLMExplainer):
                raise CrateError("--show-prompt shows what a language model is asked. Hint: give --llm URL or DIR")
            task = next(work.tasks(work.explained_keys))
            await _show(work.explainer, task, neuron)


async def _show(explainer: LLMExplainer, task: SetTask, neuron: int) -> None:
    key, total = task.key, task.records.num_neurons
    if not 0 <= neuron < total:
        raise CrateError(f"--show-prompt must be a neuron of layer {key.layer}, 0 to {total - 1}, got {neuron}")
    if reason := unexplained(task.records, task.protocol)[neuron]:
        raise CrateError(f"--show-prompt must be a neuron that can be explained, got {neuron}, which is {reason}")
    left_out = explainer.set_settings(task).get("left_out", 0)
    [(_, prompt)] = explainer.prompts(task.records, task.protocol, [neuron], left_out=left_out)
    if isinstance(prompt, PromptTooLong):
        raise prompt
    text = await _text(explainer.llm, prompt.messages)
    print(text)
    console.print(
        f"{task.store.run.name}: layer {key.layer}, neuron {neuron}, {key.protocol}, for {explainer.llm.name}: about "
        f"{prompt.tokens:,} tokens, and an answer of at most {explainer.settings.max_tokens}",
        soft_wrap=True,
    )


async def _text(llm: LLM, messages: tuple[Message, ...]) -> str:
    """The chat in the model's template; turn by turn, with a note, if only the server knows the template."""
    text = await llm.rendered(messages)
    if text is not None:
        return text
    console.print(NO_TEMPLATE, soft_wrap=True)
    return "\n\n".join(f"[{message.role}]\n{message.text}" for message in messages)
