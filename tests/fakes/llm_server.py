"""Servers on loopback that speak OpenAI's protocol: one with given answers, one with a real small model."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

import numpy as np
import torch
from tokenizers import Tokenizer

Body = dict[str, Any]
Shape = Literal["vllm", "openai", "silent", "next-openai", "next-llama"]
"""How prompt log-probabilities are given: `prompt_logprobs`, `echo` with `logprobs`, or not at all, without a word.

The last two have only the candidates of the next token, in the form of OpenAI's completions and of llama.cpp.
"""


class Answer:
    """What a server answers: a status, a body (JSON, or bytes as they are), headers, and how it breaks off."""

    def __init__(
        self, body: Any, *, status: int = 200, headers: dict[str, str] | None = None, cut: bool = False,
        wait: float = 0.0,
    ) -> None:  # fmt: skip
        self.content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status, self.headers, self.cut, self.wait = status, headers or {}, cut, wait


class Server:
    """Answers each POST with `answer(path, body)`; keeps what was asked."""

    def __init__(self, answer: Callable[[str, Body], Answer], *, served: Sequence[Body] = ({"id": "small"},)) -> None:
        self.asked: list[tuple[str, Body]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.served = [dict(one, object="model") for one in served]
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                self.reply(owner.get(self.path))

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                is_json = "json" in self.headers["Content-Type"]
                body = json.loads(content) if is_json else {"content": content.decode()}
                with owner.lock:
                    owner.asked.append((self.path, body))
                    owner.keys.append(self.headers.get("Authorization"))
                self.reply(answer(self.path, body))

            def reply(self, one: Answer) -> None:
                if one.wait:
                    owner.stopped.wait(one.wait)
                try:
                    self.send_response(one.status)
                    for name, value in ({"Content-Type": "application/json"} | one.headers).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(one.content)))
                    self.end_headers()
                    self.wfile.write(one.content[: len(one.content) // 2] if one.cut else one.content)
                except OSError:
                    self.close_connection = True  # the client has gone
                if one.cut:
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        class Threads(ThreadingHTTPServer):
            request_queue_size = 256

            def handle_error(self, *_: Any) -> None:
                pass  # a connection that was cut by the other side

        self.stopped = threading.Event()
        self.server = Threads(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def get(self, path: str) -> Answer:
        """The answer to a GET: the list of models."""
        found = path.startswith("/v1/models")
        return Answer({"object": "list", "data": self.served}) if found else refusal(f"no {path}", 404)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def counts(self) -> Counter[str]:
        """How often each content was asked for."""
        return Counter(json.dumps(one, sort_keys=True) for one in self.asked)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(timeout=10)


def completion(text: str, *, finish: str = "stop", prompt_tokens: int = 10, new_tokens: int = 3) -> Body:
    """The body of an answer to a chat."""
    return {
        "id": "1", "object": "chat.completion", "created": 0, "model": "small",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": new_tokens,
                  "total_tokens": prompt_tokens + new_tokens},
    }  # fmt: skip


def refusal(message: str, status: int, **headers: str) -> Answer:
    """An answer that says what is wrong, as OpenAI's servers do."""
    return Answer({"error": {"message": message, "type": "error", "code": None}}, status=status, headers=headers)


class ModelServer(Server):
    """Completions with the log-probabilities of a real causal language model, in float64 and one forward pass each.

    `model(ids)` gives logits, as transformers' models and ours do. The beginning-of-text token `bos`, where there is
    one, stands before every prompt, as servers do it.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, shape: Shape, *, bos: int | None = None, most: int = 20):
        self.model, self.tokenizer, self.shape, self.bos, self.most = model, tokenizer, shape, bos, most
        super().__init__(self.complete, served=[{"id": "small", "max_model_len": 4096, "root": "small"}])

    def complete(self, path: str, body: Body) -> Answer:
        if path != "/v1/completions":
            return refusal("this model has no chat template", 400)
        asked = [body.get(name) for name in ("prompt_logprobs", "logprobs")]
        if any(number is not None and number > self.most for number in asked):
            return refusal(f"at most {self.most} logprobs can be asked for", 400)
        prompt, new = self.encode(body["prompt"]), 1
        logprobs = self.logprobs(prompt)
        next_token = int(logprobs[-1].argmax())
        text, extra = self.text(next_token), {}
        choice: Body = {"index": 0, "finish_reason": "length", "logprobs": None}
        if self.shape == "vllm" and body.get("prompt_logprobs") is not None:
            extra["prompt_logprobs"] = self.vllm(prompt, logprobs, body["prompt_logprobs"])
        if self.shape == "openai" and body.get("echo"):
            text = body["prompt"] + text
            choice["logprobs"] = self.openai([*prompt, next_token], logprobs, body["logprobs"])
        if self.shape.startswith("next") and body.get("logprobs"):
            order = np.argsort(-logprobs[-1], kind="stable")[: body["logprobs"]].tolist()
            best = [{"token": self.text(one), "logprob": float(logprobs[-1][one])} for one in order]
            as_openai = {"tokens": [text], "token_logprobs": [best[0]["logprob"]], "top_logprobs": [
                {one["token"]: one["logprob"] for one in reversed(best)}
            ]}  # fmt: skip
            as_llama = {"content": [best[0] | {"top_logprobs": best}]}
            choice["logprobs"] = as_llama if self.shape == "next-llama" else as_openai
        usage = {"prompt_tokens": len(prompt), "completion_tokens": new, "total_tokens": len(prompt) + new}
        return Answer({
            "id": "1", "object": "text_completion", "created": 0, "model": "small",
            "choices": [choice | {"text": text} | extra], "usage": usage,
        })  # fmt: skip

    def encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids if self.bos is None else [self.bos, *ids]

    def text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def logprobs(self, ids: list[int]) -> np.ndarray:
        """Of every next token, (tokens, vocabulary)."""
        with torch.no_grad():
            made = self.model(torch.tensor([ids]))
        logits = getattr(made, "logits", made)
        return torch.log_softmax(logits[0].double(), dim=-1).numpy()

    def vllm(self, ids: list[int], logprobs: np.ndarray, count: int) -> list[Any]:
        """`prompt_logprobs`: the token itself first, then the most probable ones, by token id."""
        found: list[Any] = [None]
        for token, given in zip(ids[1:], logprobs, strict=False):
            order = np.argsort(-given, kind="stable")
            chosen = dict.fromkeys([token, *order[:count].tolist()])
            found.append({
                str(one): {"logprob": float(given[one]), "rank": int((given > given[one]).sum()) + 1,
                           "decoded_token": self.text(one)}
                for one in chosen
            })  # fmt: skip
        return found

    def openai(self, ids: list[int], logprobs: np.ndarray, count: int) -> Body:
        """`logprobs` of an echo: lists over tokens; the most probable ones by text."""
        texts = [self.text(token) for token in ids]
        top: list[Any] = [None]
        for given in logprobs[: len(ids) - 1]:
            order = np.argsort(-given, kind="stable")[:count].tolist()
            top.append({self.text(one): float(given[one]) for one in reversed(order)})
        own = [float(given[token]) for token, given in zip(ids[1:], logprobs, strict=False)]
        offsets = np.cumsum([0, *map(len, texts[:-1])]).tolist()
        return {"tokens": texts, "token_logprobs": [None, *own], "top_logprobs": top, "text_offset": offsets}
