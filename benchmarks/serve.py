"""The live browser: how soon its first page is there, and how it does under load.

    python benchmarks/serve.py RUN... [--clients 50] [--seconds 60]

Starts `cratelm serve` on loopback with the runs, twice: the first makes the overview, where none was kept, the second
finds it. Prints when the address, the first page's data and the whole overview were there. Then clients look at random
places, search, turn neurons and write, each as fast as it is answered. Prints of each kind of request, apart for each
status (429 is an answer: come again), how many there were and how long they took, and the server's memory over time.
"""

import argparse
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

TEXTS = ("def read(self, path):", "The quick brown fox jumps over the lazy dog.", "import os\nfor name in")


@dataclass
class Seen:
    """What all clients saw."""

    seconds: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    """Of each kind of request and status."""
    broken: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Target:
    """The server as clients know it."""

    place: str
    token: str
    site: Any
    sizes: dict[str, tuple[int, int]]
    """Of each layer's folder, how many chunks of neurons and of texts it has."""
    words: tuple[str, ...]
    """That explanations hold."""

    def pick(self, rng: random.Random) -> tuple[str, str, bytes | None]:
        """One request of some kind: kind, path, body."""
        model = rng.choice([one for one in self.site["models"] if one["taps"]])
        layer = rng.choice(model["taps"][0]["layers"])
        kind = rng.choices(
            ["neuron", "layer", "list", "overview", "site", "search", "activations", "effect", "continue"],
            [40, 8, 8, 4, 4, 8, 12, 10, 6],
        )[0]
        neurons, texts = self.sizes[layer["folder"]]
        change = {"layer": layer["layer"], "neuron": rng.randrange(16), "how": "set", "strength": 1.0}
        asked: dict[str, Any] = {"model": model["slug"], "text": rng.choice(TEXTS)}
        match kind:
            case "neuron":
                return kind, f"/data/{layer['folder']}/neurons-{rng.randrange(neurons)}.json", None
            case "layer":
                return kind, f"/data/{layer['folder']}/layer.json", None
            case "list":
                return kind, f"/data/{layer['folder']}/texts-{rng.randrange(texts)}.json", None
            case "overview" | "site":
                return kind, f"/data/{kind}.json", None
            case "search":
                words = " ".join(rng.sample(self.words, rng.choice((1, 1, 2))))
                return kind, f"/api/search?q={quote(words)}", None
            case "activations":
                return kind, "/api/activations", json.dumps(asked).encode()
            case _:
                return kind, f"/api/{kind}", json.dumps(asked | {"changes": [change], "tokens": 20}).encode()

    def ask(self, connection: http.client.HTTPConnection, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Send one request and read all of its answer: status and content."""
        headers = {"content-type": "application/json", "x-cratelm-token": self.token} if body else {}
        connection.request("POST" if body else "GET", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def client(target: Target, seed: int, until: float, seen: Seen) -> None:
    """Ask until the time is over; come again a moment later where told so."""
    rng = random.Random(seed)
    connection = http.client.HTTPConnection(target.place, timeout=60)
    while time.monotonic() < until:
        kind, path, body = target.pick(rng)
        started = time.monotonic()
        try:
            status, _ = target.ask(connection, path, body)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            with seen.lock:
                seen.broken.append(f"{kind}: {error!r}")
            continue
        with seen.lock:
            seen.seconds[kind, status].append(time.monotonic() - started)
        if status == 429:
            time.sleep(0.2)
    connection.close()


def memory(process: int) -> int:
    """Resident memory of a process, in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return int(found[1]) // 1024 if found else 0


def start(runs: list[str]) -> tuple[subprocess.Popen[str], str]:
    """Start the server; returns it and its host and port."""
    command = [sys.executable, "-m", "cratelm", "serve", *runs, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if match := re.search(r"http://([^/\s]+)/", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, match[1]
    raise SystemExit("the server did not start")


def first_page(place: str) -> tuple[float, float]:
    """Seconds until the page and its first data are there, and until the whole overview is."""
    connection, started = http.client.HTTPConnection(place, timeout=120), time.monotonic()
    first = 0.0
    while True:
        for path in ("/", "/data/site.json", "/data/overview.json"):
            connection.request("GET", path)
            content = connection.getresponse().read()
        first = first or time.monotonic() - started
        if "making" not in json.loads(content):
            connection.close()
            return first, time.monotonic() - started
        time.sleep(0.05)


def opened(place: str) -> Target:
    """The server with its models loaded and its layers read."""
    connection = http.client.HTTPConnection(place, timeout=120)
    connection.request("GET", "/")
    page = connection.getresponse().read().decode()
    token = re.search(r'cratelm-token" content="([^"]+)"', page)
    assert token is not None
    connection.request("GET", "/data/site.json")
    target, words = Target(place, token[1], json.loads(connection.getresponse().read()), {}, ()), {"fires"}
    for model in target.site["models"]:
        body = json.dumps({"model": model["slug"], "text": "warm"}).encode()
        target.ask(connection, "/api/activations", body)
        for folder in (layer["folder"] for tap in model["taps"][:1] for layer in tap["layers"]):
            told = json.loads(target.ask(connection, f"/data/{folder}/layer.json")[1])
            target.sizes[folder] = (
                -(-told["neurons"] // told["neurons_each"]),
                -(-told["neurons"] // told["texts_each"]),
            )
            rows = json.loads(target.ask(connection, f"/data/{folder}/texts-0.json")[1])["texts"]
            words |= {word for row in rows[:50] for text, _ in row for word in re.findall(r"[A-Za-z]{2,12}", text)}
    connection.close()
    return replace(target, words=(*sorted(words), "nowhere"))


def load(process: int, place: str, clients: int, seconds: float) -> tuple[Seen, list[int]]:
    """Let clients ask for some seconds; what they saw, and the server's memory a few times on the way."""
    target = opened(place)
    seen, held = Seen(), [memory(process)]
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=client, args=(target, i, until, seen)) for i in range(clients)]
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        time.sleep(seconds / 6)
        held.append(memory(process))
    for thread in threads:
        thread.join()
    return seen, held


def main() -> None:
    """Read the flags, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--clients", type=int, default=50, help="0 measures the first page alone")
    parser.add_argument("--seconds", type=float, default=60)
    flags = parser.parse_args()
    for which in ("first", "second"):
        began = time.monotonic()
        process, place = start(flags.runs)
        address = time.monotonic() - began
        try:
            first, whole = first_page(place)
            said = f"then first page {first:.2f} s, with overview {whole:.2f} s"
            print(f"{which} start: address after {address:.1f} s; {said}")
            if which == "second" and flags.clients:
                report(flags, *load(process.pid, place, flags.clients, flags.seconds))
        finally:
            process.terminate()
            process.wait(20)


def report(flags: argparse.Namespace, seen: Seen, held: list[int]) -> None:
    """Print what clients saw."""
    total = sum(map(len, seen.seconds.values()))
    print(f"{flags.clients} clients, {flags.seconds:g} s: {total} answers, {total / flags.seconds:.0f}/s, "
          f"{len(seen.broken)} without an answer; memory in MiB: {', '.join(map(str, held))}")  # fmt: skip
    print(f"{'':<10}{'status':>7}{'answers':>9}{'median ms':>11}{'95 % ms':>9}{'worst ms':>10}")
    for (kind, status), taken in sorted(seen.seconds.items()):
        ranked = sorted(1e3 * one for one in taken)
        print(f"{kind:<10}{status:>7}{len(taken):>9}{statistics.median(ranked):>11.1f}"
              f"{ranked[int(0.95 * (len(ranked) - 1))]:>9.1f}{ranked[-1]:>10.1f}")  # fmt: skip
    if seen.broken:
        print("\n".join(seen.broken[:10]))


if __name__ == "__main__":
    main()
