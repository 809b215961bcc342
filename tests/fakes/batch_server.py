"""The server of rules with OpenAI's Batch API; batches are answered when a test says so."""

import json
import re
from typing import Any

from fakes.llm_server import Answer, Body, refusal
from fakes.rule_server import RuleServer


class BatchServer(RuleServer):
    """Answers chats live and in batches. A test changes lines (`spoil`), states, and what is refused (`refused`)."""

    def __init__(self) -> None:
        super().__init__(probabilities=False)
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, Body] = {}
        self.lines: list[Body] = []
        """Requests of all batches."""
        self.refused: dict[str, Answer] = {}
        """Path -> what is answered there instead."""
        self.cut_creation = False
        """Whether the connection is cut when a batch has been created."""

    def get(self, path: str) -> Answer:
        plain = path.partition("?")[0]
        if plain in self.refused:
            return self.refused[plain]
        if plain == "/v1/batches":
            return self.listed(path)
        if match := re.fullmatch(r"/v1/batches/(.+)", plain):
            return Answer(self.batches[match[1]]) if match[1] in self.batches else refusal("no such batch", 404)
        if match := re.fullmatch(r"/v1/files/(.+)/content", plain):
            return Answer(self.files[match[1]])
        return super().get(path)

    def listed(self, path: str) -> Answer:
        """Pages of one batch each, newest first."""
        names = list(self.batches)[::-1]
        after = re.search(r"after=([^&]+)", path)
        rest = names[names.index(after[1]) + 1 :] if after else names
        page = [self.batches[name] for name in rest[:1]]
        return Answer({"object": "list", "data": page, "has_more": len(rest) > 1})

    def answer(self, path: str, body: Body) -> Answer:
        if path in self.refused:
            return self.refused[path]
        if path == "/v1/files":
            assert 'name="purpose"\r\n\r\nbatch\r\n' in body["content"]
            requests = [line for line in body["content"].splitlines() if line.startswith("{")]
            name = f"file-{len(self.files)}"
            self.files[name] = "\n".join(requests).encode()
            return Answer({"id": name, "object": "file", "purpose": "batch"})
        if path == "/v1/batches":
            name = f"batch_{len(self.batches)}"
            self.batches[name] = {"id": name, "object": "batch", "status": "in_progress", **body}
            requests = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
            self.lines += requests
            counts = {"total": len(requests), "completed": 0, "failed": 0}
            self.batches[name]["request_counts"] = counts
            return Answer(self.batches[name], cut=self.cut_creation)
        return super().answer(path, body)

    @property
    def chats(self) -> int:
        """Chats that were sent live."""
        return sum(path == "/v1/chat/completions" for path, _ in self.asked)

    def finish(self, *, status: str = "completed", spoil: dict[int, Any] | None = None) -> None:
        """End all batches. `spoil`: line -> what the output has in its place: a row, text, or None for nothing."""
        for batch in self.batches.values():
            if batch["status"] != "in_progress":
                continue
            requests = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
            output, errors = list[str](), list[str]()
            for number, request in enumerate(requests):
                body = json.loads(super().answer("/v1/chat/completions", request["body"]).content)
                row: Any = {
                    "id": f"r{number}", "custom_id": request["custom_id"], "error": None,
                    "response": {"status_code": 200, "request_id": "1", "body": body},
                }  # fmt: skip
                row = {**row, **spoiled} if isinstance(spoiled := (spoil or {}).get(number, {}), dict) else spoiled
                failed = isinstance(row, dict) and (row["error"] or row["response"]["status_code"] != 200)
                if row is not None:
                    (errors if failed else output).append(row if isinstance(row, str) else json.dumps(row))
            for name, lines in (("output", output[::-1]), ("error", errors)):
                file = f"{name}-{batch['id']}"
                self.files[file] = "".join(f"{line}\n" for line in lines).encode()
                batch[f"{name}_file_id"] = file if lines else None
            batch["status"] = status
