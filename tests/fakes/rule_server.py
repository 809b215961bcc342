"""The model that follows rules (`rule_follower.py`) behind a server in vLLM's shape: it explains and simulates."""

import asyncio
import json
import re
from typing import Any

import numpy as np
from fakes.llm_server import Answer, Body, Server, completion, refusal
from fakes.rule_follower import RULES, RuleFollower
from fakes.scripted import shown_pairs

from cratelm.interpretation.llm import LLMError, Message, Sampling


def best_rule(messages: list[Message]) -> str:
    """The rule that fits the activations shown best; an explainer that is never wrong about these neurons."""
    pairs = shown_pairs(messages)
    tokens, values = [token for token, _ in pairs], np.array([float(value) for _, value in pairs])
    fits = {text: np.array([rule(tokens, i) for i in range(len(tokens))]) for text, rule in RULES.items()}
    return max(fits, key=lambda text: float(np.corrcoef(fits[text], values)[0, 1]) if np.ptp(fits[text]) else -1.0)


class RuleServer(Server):
    """Serves `rules`. With `probabilities=False` it ignores `prompt_logprobs`, as many servers do.

    With `next_token=True` it returns the candidates of the next token instead, in the form of llama.cpp.
    With `system=False` its chat template knows no turn of the system, and refuses a chat that has one.
    """

    def __init__(
        self, *, probabilities: bool = True, context: int = 8192, ten: bool = True, system: bool = True,
        next_token: bool = False,
    ) -> None:  # fmt: skip
        self.follower, self.probabilities, self.system = RuleFollower(ten=ten), probabilities, system
        self.next_token = next_token
        super().__init__(self.answer, served=[{"id": "rules", "max_model_len": context}])

    def answer(self, path: str, body: Body) -> Answer:
        if body["model"] != "rules":
            return refusal(f"The model `{body['model']}` does not exist.", 404)
        if path == "/v1/completions":
            return self.complete(body)
        messages = [Message(one["role"], one["content"]) for one in body["messages"]]
        if not self.system and messages[0].role == "system":
            return refusal("System role not supported", 400)
        tokens = sum(self.follower.count(message.text) for message in messages)
        if "Explanation of neuron" in messages[-1].text:
            return Answer(completion(f" {best_rule(messages)}.", prompt_tokens=tokens, new_tokens=8))
        if "Pieces:" in messages[-1].text:
            return Answer(completion(self.judged(messages[-1].text), prompt_tokens=tokens, new_tokens=8))
        try:
            reply = asyncio.run(self.follower.chat(messages, Sampling(max_tokens=body["max_tokens"])))
        except LLMError:
            return Answer(completion("Hello.", prompt_tokens=tokens, new_tokens=2))
        return Answer(completion(reply.text, prompt_tokens=tokens, new_tokens=reply.new_tokens))

    def judged(self, question: str) -> str:
        """Which pieces have a token on which the explanation's rule fires; nothing where there is no explanation."""
        explanation = re.search(r"^Pattern: (.*)$", question, flags=re.MULTILINE)
        if explanation is None:
            return "I see no pattern"
        pieces = re.findall(r"^\d+\. (.*)$", question, flags=re.MULTILINE)
        cut = [re.findall(r"\\n|\\t|\s*\w+|\s*[^\w\s]", piece) for piece in pieces]
        rule = RULES.get(explanation[1], lambda *_: 0)
        return json.dumps({"answers": [int(any(rule(c, i) > 0 for i in range(len(c)))) for c in cut]})

    def complete(self, body: Body) -> Answer:
        """What it expected at each token of the prompt: all that matters where an activation stands, else little."""
        tokens = re.findall(r"unknown|10|\d|[^\W\d_]+|.|\n", body["prompt"])
        choice: Body = {"index": 0, "finish_reason": "length", "logprobs": None, "text": "a"}
        if self.probabilities and body.get("prompt_logprobs") is not None:
            ends = np.cumsum([0, *map(len, tokens)]).tolist()
            places: list[Any] = [None]
            for i, token in enumerate(tokens[1:], 1):
                before = body["prompt"][: ends[i]]
                wanted = before.endswith("\t") and re.match(r"unknown|\d|\?|_|-|x", token)
                found = self.follower.expects(before, body["prompt_logprobs"]) if wanted else {}
                table = {token: float(found.get(token, -8.0 - 0.1 * len(token)))} | {
                    text: p for text, p in found.items()
                }
                places.append({
                    str(number): {"logprob": p, "rank": number + 1, "decoded_token": text}
                    for number, (text, p) in enumerate(table.items())
                })  # fmt: skip
            choice["prompt_logprobs"] = places
        if self.next_token and body.get("logprobs"):
            found = self.follower.expects(body["prompt"], body["logprobs"])
            entries = [{"token": text, "logprob": p} for text, p in found.items()]
            choice["logprobs"] = {"content": [entries[0] | {"top_logprobs": entries}]}
        usage = {"prompt_tokens": len(tokens), "completion_tokens": 1, "total_tokens": len(tokens) + 1}
        return Answer({
            "id": "1", "object": "text_completion", "created": 0, "model": "rules", "choices": [choice], "usage": usage,
        })  # fmt: skip
