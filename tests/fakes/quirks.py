"""Answers of real providers that err: each quirk is a function of a server's request and its number, for `Server`."""

import json
from collections.abc import Callable

from fakes.llm_server import Answer, Body, completion

ANSWER = "rain and storms"
THOUGHTS = 'Let me see. The tokens are wet weather.\nSo it is weather, perhaps {"answers": [1]}.'
Quirk = Callable[[Body, int], Answer]
"""Body of a chat request, and its number from 1 -> the answer."""


def error(message: str, status: int = 400, *, code: object = None, http: int | None = None) -> Answer:
    """An error with a status, or in the body of a response with status `http`."""
    return Answer({"error": {"message": message, "type": "error", "code": code or status}}, status=http or status)


def chat(content: object, *, finish: str = "stop", new_tokens: int = 3, **message: object) -> Answer:
    """A chat completion with any content and further fields of the message."""
    body = completion("", finish=finish, new_tokens=new_tokens)
    body["choices"][0]["message"] = {"role": "assistant", "content": content, **message}
    return Answer(body)


def refusing(parameter: str, message: str = "Bad request", status: int = 400) -> Quirk:
    """A server that refuses every request with this parameter."""
    return lambda body, _: error(message, status) if parameter in body else chat(ANSWER)


def first(fault: Answer, times: int = 1) -> Quirk:
    """A fault, that many times, then answers."""
    return lambda _, number: fault if number <= times else chat(ANSWER)


def failed_choice(content: object, **reported: object) -> Answer:
    """A completion whose only choice is an error of the provider behind the server."""
    body = json.loads(chat(content, finish="error").content)
    body["choices"][0] |= reported
    return Answer(body)


REASONED = {
    **{
        f"<{name}>": f"<{name}>{THOUGHTS}</{name}>\n\n{ANSWER}"
        for name in ("think", "thinking", "thought", "thoughts", "reasoning", "THINK", "seed:think", "reflection")
    },
    "closed only": f"{THOUGHTS}</think>{ANSWER}", "closed thinking only": f"{THOUGHTS}\n</thinking>\n{ANSWER}",
    "attributes": f'<think lang="en">{THOUGHTS}</think>{ANSWER}',
    "two": f"<think>a</think><think>{THOUGHTS}</think>{ANSWER}",
    "nested": f"<think>a <think>b</think> {THOUGHTS}</think>{ANSWER}", "kimi": f"◁think▷{THOUGHTS}◁/think▷{ANSWER}",
    "brackets": f"[THINK]{THOUGHTS}[/THINK]{ANSWER}", "start": f"<|START_THINKING|>{THOUGHTS}<|END_THINKING|>{ANSWER}",
    "thought tokens": f"<|begin_of_thought|>{THOUGHTS}<|end_of_thought|>{ANSWER}",
    "channels": "<|channel|>analysis<|message|>" + THOUGHTS + "<|end|><|start|>assistant<|channel|>final<|message|>"
    + ANSWER + "<|return|>",
    "bare channels": f"analysis{THOUGHTS}assistantfinal{ANSWER}",
    **{f"<{name}> too": f"<{name}>{THOUGHTS}</{name}>{ANSWER}" for name in ("cot", "plan", "inner_thoughts")},
    "half channels": f"<|channel>thought\n{THOUGHTS}<channel|>{ANSWER}",
    "unused": f"<unused94>thought\n{THOUGHTS}<unused95>{ANSWER}",
    "spaces": f"< think >{THOUGHTS}< / think >{ANSWER}", "wide bars": f"<｜think｜>{THOUGHTS}<｜/think｜>{ANSWER}",
    "details": f'<details type="reasoning">{THOUGHTS}</details>{ANSWER}',
    "escaped": f"&lt;think&gt;{THOUGHTS}&lt;/think&gt;{ANSWER}",
    "headings": f"**Thinking:** {THOUGHTS}\n\n**Answer:** {ANSWER}",
    "sentences": f"Here is my thought process: {THOUGHTS}\nHere is my response: {ANSWER}",
    **{
        f"in <{name}>": f"<think>{THOUGHTS}</think>\n<{name}>\n{ANSWER}\n</{name}>"
        for name in ("answer", "response", "output", "final_answer")
    },
    "solution": f"<|begin_of_thought|>{THOUGHTS}<|end_of_thought|><|begin_of_solution|>{ANSWER}<|end_of_solution|>",
    "words and tags": f"{THOUGHTS} <answer>{ANSWER}</answer>",
    **{f"before {end}": f"<think>{THOUGHTS}</think>{ANSWER}{end}" for end in ("<|im_end|>", "<|eot_id|>", "</s>")},
}  # fmt: skip
"""Answers with reasoning before `ANSWER`."""
ONLY_REASONED = {
    "tag": f"<think>{THOUGHTS}", "pair": f"<think>{THOUGHTS}</think>", "closed": f"{THOUGHTS}</think>",
    "heading": f"Reasoning: {THOUGHTS}", "half channel": f"<|channel>thought\n{THOUGHTS}",
    "sentence": f"Here's my thinking process: {THOUGHTS}", "channel": f"<|channel|>analysis<|message|>{THOUGHTS}",
    "bare channel": f"analysis{THOUGHTS}",
}  # fmt: skip
"""Answers that are only reasoning."""
