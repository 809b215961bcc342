"""The live browser under load: clients that look, search, turn neurons and write, each as fast as it is answered.

    python benchmarks/serve.py RUN... [--clients 50] [--seconds 60]

Starts `cratelm serve` on loopback with the runs, ends it, and prints of each kind of request how many there were, how
they were answered (429 is an answer: come again), median and worst latency, and the server's memory over time.
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
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEXTS = ("def read(self, path):", "The quick brown fox jumps over the lazy dog.", "import os\nfor name in")


@dataclass
class Seen:
    """What all clients saw."""

    latency: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    status: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    broken: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Target:
    """The server as clients know it."""

    place: str
    token: str
    site: Any

    def pick(self, rng: random.Random) -> tuple[str, str, bytes | None]:
        """One request of some kind: kind, path, body."""
        model = rng.choice([one for one in self.site["models"] if one["taps"]])
        layer = rng.choice(model["taps"][0]["layers"])
        kind = rng.choices(
            ["neuron", "layer", "list", "search", "look", "effect", "continue"], [40, 8, 8, 8, 16, 12, 8]
        )[0]
        change = {"layer": layer["layer"], "neuron": rng.randrange(16), "how": "set", "strength": 1.0}
        asked: dict[str, Any] = {"model": model["slug"], "text": rng.choice(TEXTS)}
        match kind:
            case "neuron":
                return kind, f"/data/{layer['folder']}/neurons-{rng.randrange(4)}.json", None
            case "layer":
                return kind, f"/data/{layer['folder']}/layer.json", None
            case "list":
                return kind, f"/data/{layer['folder']}/texts-0.json", None
            case "search":
                return kind, "/api/search?q=fires", None
            case "look":
                return kind, "/api/look", json.dumps(asked).encode()
            case _:
                return kind, f"/api/{kind}", json.dumps(asked | {"changes": [change], "tokens": 20}).encode()

    def ask(self, connection: http.client.HTTPConnection, path: str, body: bytes | None) -> int:
        """Send one request and read all of its answer."""
        headers = {"content-type": "application/json", "x-cratelm-token": self.token} if body else {}
        connection.request("POST" if body else "GET", path, body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status


def client(target: Target, seed: int, until: float, seen: Seen) -> None:
    """Ask until the time is over; come again a moment later where told so."""
    rng = random.Random(seed)
    connection = http.client.HTTPConnection(target.place, timeout=60)
    while time.monotonic() < until:
        kind, path, body = target.pick(rng)
        started = time.monotonic()
        try:
            status = target.ask(connection, path, body)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            with seen.lock:
                seen.broken.append(f"{kind}: {error!r}")
            continue
        with seen.lock:
            seen.latency[kind].append(time.monotonic() - started)
            seen.status[kind][status] += 1
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


def load(process: int, place: str, clients: int, seconds: float) -> tuple[Seen, list[int]]:
    """Let clients ask for some seconds; what they saw, and the server's memory a few times on the way."""
    connection = http.client.HTTPConnection(place, timeout=120)
    connection.request("GET", "/")
    page = connection.getresponse().read().decode()
    token = re.search(r'cratelm-token" content="([^"]+)"', page)
    assert token is not None
    connection.request("GET", "/data/site.json")
    target = Target(place, token[1], json.loads(connection.getresponse().read()))
    for model in target.site["models"]:  # models are opened and layers read before the clock runs
        body = json.dumps({"model": model["slug"], "text": "warm"}).encode()
        target.ask(connection, "/api/look", body)
        for layer in (layer for tap in model["taps"][:1] for layer in tap["layers"]):
            target.ask(connection, f"/data/{layer['folder']}/layer.json", None)
    connection.close()
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
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    flags = parser.parse_args()
    process, place = start(flags.runs)
    try:
        seen, held = load(process.pid, place, flags.clients, flags.seconds)
    finally:
        process.terminate()
        process.wait(20)
    total = sum(map(len, seen.latency.values()))
    print(f"{flags.clients} clients, {flags.seconds:g} s: {total} answers, {total / flags.seconds:.0f}/s, "
          f"{len(seen.broken)} without an answer; memory in MiB: {', '.join(map(str, held))}")  # fmt: skip
    print(f"{'':<10}{'answers':>9}{'429':>7}{'other':>7}{'median ms':>11}{'95 % ms':>9}{'worst ms':>10}")
    for kind, taken in seen.latency.items():
        counts = seen.status[kind]
        other = sum(counts.values()) - counts[200] - counts[429]
        ranked = sorted(1e3 * one for one in taken)
        print(f"{kind:<10}{len(taken):>9}{counts[429]:>7}{other:>7}{statistics.median(ranked):>11.1f}"
              f"{ranked[int(0.95 * (len(ranked) - 1))]:>9.1f}{ranked[-1]:>10.1f}")  # fmt: skip
    if seen.broken:
        print("\n".join(seen.broken[:10]))


if __name__ == "__main__":
    main()
