"""The live browser as a process on loopback: what it answers, refuses and survives."""

import contextlib
import http.client
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.live_runs import CONTEXT, NEURONS, live_runs
from fixtures.serving import Served, serve
from tokenizers import Tokenizer

import cratelm
from cratelm.cli import main
from cratelm.model.language_model import LanguageModel
from cratelm.report.browser.chunks import as_json
from cratelm.report.browser.site import layer_chunks
from cratelm.report.browser.views import open_layer

pytest.importorskip("starlette", reason="starlette is not installed (extra serve)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")

TEXT = "the neuron code of a layer"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return live_runs(tmp_path_factory.mktemp("runs"), np.random.default_rng(11))


@pytest.fixture(scope="module")
def server(runs: list[Path]) -> Iterator[Served]:
    with serve(*runs, "--in-flight", "2", "--new-tokens", "2000") as found:
        yield found


def loaded(run: Path) -> tuple[LanguageModel, Tokenizer]:
    model, tokenizer = cratelm.load(run / "model")
    assert tokenizer is not None
    return model, tokenizer


def steering(**more: Any) -> dict[str, Any]:
    change = {"layer": 1, "neuron": 7, "how": "set", "strength": 2.5}
    return {"model": "crate-2l", "text": TEXT, "changes": [change], "tokens": 12} | more


def test_the_page_is_served_with_a_policy_and_a_token(server: Served) -> None:
    page = server.ask("/")
    assert page.status == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "script-src 'self'" in policy
    html = page.content.decode()
    assert policy in html
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=", html)
    for name in re.findall(r'(?:src|href)="(viewer/[^"]+)"', html):
        found = server.ask(f"/{name}")
        assert found.status == 200, name
        assert found.headers["x-content-type-options"] == "nosniff"


def test_chunks_are_those_of_the_site(server: Served, runs: list[Path]) -> None:
    site = server.ask("/data/site.json").json
    assert site["capabilities"]["live"]["contexts"] == {"crate-2l": CONTEXT, "gpt2-2l": CONTEXT}
    from cratelm.report.browser.catalogue import catalogue

    layer = catalogue(runs, "fixed")[0].taps[0].layers[1]
    for name, value in layer_chunks(open_layer(layer)):
        assert server.ask(f"/data/{layer.folder}/{name}.json").content.decode() == as_json(value)


@pytest.mark.parametrize(
    "path",
    [
        "/data/none.json", "/data/m0/t0/l9/layer.json", "/data/m0/t0/l0/neurons-99.json",
        "/data/m0/t0/l0/neurons-01.json",
        "/data/m0/t0/l0/neurons--1.json", "/data/../../etc/passwd.json", "/data/%2e%2e/%2e%2e/run.json",
        "/viewer/..%2f..%2fserver.py", "/viewer/%2e%2e/server.py", "/viewer/index.html", "//etc/passwd", "/run.json",
        "/data/m0/t0/l0/neurons-%D9%A3.json", "/api/none", "/data/search/-1.json",
    ],
)  # fmt: skip
def test_nothing_in_an_address_becomes_a_path(server: Served, path: str) -> None:
    found = server.ask(path)
    assert found.status in (404, 405)
    assert "root:" not in found.content.decode()


def read_by_the_model(tokenizer: Any) -> torch.Tensor:
    """A text is a document: the end-of-text token comes before it."""
    return torch.tensor([[tokenizer.token_to_id("<|endoftext|>"), *tokenizer.encode(TEXT).ids]])


def test_activations_of_a_text_are_those_of_the_model(server: Served, runs: list[Path]) -> None:
    model, tokenizer = loaded(runs[0])
    tokens = read_by_the_model(tokenizer)
    with torch.inference_mode(), cratelm.capture(model, model.neuron_taps) as codes:
        model(tokens)
    found = server.post("/api/activations", {"model": "crate-2l", "text": TEXT, "strongest": 4}).json
    assert "".join(found["tokens"]) == TEXT
    for layer, tap in zip(found["layers"], model.neuron_taps, strict=True):
        code = codes[tap][0, 1:].numpy()
        for row, listed in zip(code, layer["strongest"], strict=True):
            order = [int(i) for i in np.argsort(-row, kind="stable")[:4] if row[i] > 0]
            assert [row[neuron] for neuron, _ in listed] == pytest.approx([row[i] for i in order], rel=1e-5)
    along = server.post("/api/activations", {"model": "crate-2l", "text": TEXT, "layer": 1, "neuron": 5}).json
    np.testing.assert_allclose(along["values"], codes[model.neuron_taps[1]][0, 1:, 5], rtol=1e-5, atol=1e-7)


def test_the_effect_equals_that_of_an_edit(server: Served, runs: list[Path]) -> None:
    model, tokenizer = loaded(runs[0])
    tokens = read_by_the_model(tokenizer)

    def set_neuron_7(code: torch.Tensor) -> torch.Tensor:
        code = code.clone()
        code[..., 7] = 2.5
        return code

    with torch.inference_mode():
        before = model(tokens)[0, -1].softmax(-1)
        with cratelm.edit(model, {model.neuron_taps[1]: set_neuron_7}):
            after = model(tokens)[0, -1].softmax(-1)
    found = server.post("/api/effect", steering()).json
    assert found["changes"] == ["1/7=set:2.5"]
    first = found["rises"][0]
    assert first["token"] == int((after - before).argmax())
    assert (first["before"], first["after"]) == pytest.approx(
        (float(before[first["token"]]), float(after[first["token"]])), rel=1e-4
    )


def lines(server: Served, asked: dict[str, Any]) -> list[dict[str, Any]]:
    found = server.post("/api/continue", asked)
    assert found.status == 200
    return [json.loads(line) for line in found.content.decode().splitlines()]


def test_the_text_without_steering_is_the_models_own(server: Served, runs: list[Path]) -> None:
    model, tokenizer = loaded(runs[0])
    prompt = read_by_the_model(tokenizer)
    own = tokenizer.decode(model.generate(prompt, 12, temperature=0)[0].tolist(), skip_special_tokens=False)
    found = lines(server, steering())
    assert found[-1] == {"done": True}
    text = {side: "".join(line.get(side, "") for line in found) for side in ("plain", "steered")}
    assert f"<|endoftext|>{TEXT}{text['plain']}" == own
    assert text["steered"] != text["plain"]
    same = lines(server, steering(changes=[{"layer": 1, "neuron": 7, "how": "scale", "strength": 1}]))
    sides = {side: "".join(line.get(side, "") for line in same) for side in ("plain", "steered")}
    assert sides["steered"] == sides["plain"] == text["plain"]


@pytest.mark.parametrize(
    ("path", "asked", "said"),
    [
        ("activations", {"model": "none", "text": "t"}, "got 'none'"),
        ("activations", {"model": "crate-2l", "text": ""}, "text must be a text that is not empty"),
        ("activations", {"model": "crate-2l", "text": "the " * 200}, f"at most {CONTEXT - 1} tokens"),
        ("activations", {"model": "crate-2l", "text": "t", "layer": 7, "neuron": 0}, "layer must be 0 to 1, got 7"),
        ("activations", {"model": "crate-2l", "text": "t", "layer": 0, "neuron": NEURONS}, f"0 to {NEURONS - 1}"),
        ("effect", steering(changes=[{"layer": 0, "neuron": 64, "strength": 1}]), "64"),
        ("effect", steering(changes=[{"layer": 0, "neuron": 0, "strength": 2, "of_maximum": True}]), "recorded"),
        ("continue", steering(model="none"), "model must be one of"),
        ("continue", steering(tokens=10**9), "whole number"),
        ("explain", {"model": "crate-2l", "tap": "neurons", "layer": 0, "neuron": 3}, "--llm"),
        ("votes", {"choice": "a"}, "a vote must have"),
    ],
)
def test_wrong_requests_get_one_line(server: Served, path: str, asked: dict[str, Any], said: str) -> None:
    found = server.post(f"/api/{path}", asked)
    assert found.status == 400
    assert said in found.json["error"]
    assert "Traceback" not in found.content.decode()


def test_a_body_that_is_not_json_is_refused(server: Served) -> None:
    own: dict[str, Any] = {"content_type": "application/json", "x_cratelm_token": server.page_token()}
    for body in (b"{", b"[]", b"\xff", b"[" * 60_000):
        assert server.ask("/api/activations", method="POST", body=body, **own).status == 400
    assert server.ask("/api/activations", method="POST", body=b"x" * 70_000, **own).status == 413
    endless = http.client.HTTPConnection(server.place, timeout=60)
    endless.request(
        "POST", "/api/activations", iter([b"x" * 40_000] * 2), {k.replace("_", "-"): v for k, v in own.items()}
    )
    assert endless.getresponse().status == 413
    endless.close()
    assert (
        server.ask("/api/activations", method="POST", body=b'{"strongest":' + b"9" * 5000 + b"}", **own).status == 400
    )
    assert server.ask("/api/activations", method="POST", body=b"{}", content_type="application/json").status == 403
    assert server.ask("/api/votes", method="DELETE", **own).status == 405
    assert server.ask("/", Host="evil.example").status == 421


def test_votes_are_kept_in_the_run(server: Served, runs: list[Path]) -> None:
    vote = {"date": "2026-01-01", "a": "x", "b": "y", "explanations": ["<img src=x>", ""], "explainers": ["l", "l"],
            "choice": "same"}  # fmt: skip
    before = len(server.ask("/api/votes").json["votes"])
    assert server.post("/api/votes", vote).json == {"count": before + 1}
    assert len(server.ask("/api/votes").json["votes"]) == before + 1
    assert server.ask(f"/api/votes?after={before}").json["next"] is None
    assert server.ask("/api/votes?after=-1").status == 400
    assert (runs[0] / "votes.sqlite").exists()
    half = server.post("/api/votes", vote | {"explanations": ["half a pair: \ud800", ""]})
    assert half.status == 200
    assert server.ask("/api/votes").json["votes"][-1]["explanations"][0] == "half a pair: \ud800"
    assert server.post("/api/activations", {"model": "crate-2l", "text": "t", "strongest": "\ud800"}).status == 400


def test_search_finds_explanations_and_the_index_is_made(server: Served) -> None:
    until = time.monotonic() + 60
    while (found := server.ask("/data/search/directory.json")).status == 503:
        assert int(found.headers["retry-after"]) > 0
        assert time.monotonic() < until
        time.sleep(0.2)
    assert found.json["first"]
    assert server.ask("/data/search/0.json").status == 200
    hits = server.ask("/api/search?q=fires").json["found"]
    assert {"model", "tap", "layer", "neuron", "text"} <= set(hits[0])
    assert server.ask("/api/search?q=%22%27%3B--").status == 200
    assert server.ask("/api/search?q=a%00b").status == 200
    assert server.ask("/api/search?q=" + "a" * 500).status == 400


def test_search_shows_an_explanation_once_and_every_model(server: Served) -> None:
    found = server.ask("/api/search?q=fires").json["found"]
    said = [(one["model"], one["layer"], one["neuron"], one["explainer"], one["text"]) for one in found]
    assert len(set(said)) == len(said)
    assert {one["model"] for one in found} == {"crate-2l", "gpt2-2l"}
    assert any("," in one["protocol"] for one in found)


@contextlib.contextmanager
def writing(server: Served) -> Iterator[http.client.HTTPResponse]:
    """A long continuation whose first line has come."""
    own = {"content-type": "application/json", "x-cratelm-token": server.page_token()}
    with contextlib.closing(http.client.HTTPConnection(server.place, timeout=60)) as connection:
        connection.request("POST", "/api/continue", json.dumps(steering(tokens=2000)).encode(), own)
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.readline()
        yield answer
        answer.close()


def test_a_request_beyond_the_limit_gets_retry_after(server: Served) -> None:
    with writing(server) as first, writing(server) as second:
        refused = server.post("/api/activations", {"model": "crate-2l", "text": "t"})
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) > 0
        assert [json.loads(one.readlines()[-1]) for one in (first, second)] == [{"done": True}] * 2
    assert server.post("/api/activations", {"model": "crate-2l", "text": "t"}).status == 200


def test_generation_stops_when_the_client_disconnects(server: Served) -> None:
    for _ in range(2):
        with writing(server):
            pass
    until = time.monotonic() + 30
    while (found := server.post("/api/activations", {"model": "crate-2l", "text": "t"}).status) == 429:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert found == 200


def test_bad_options_get_one_line(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["serve"], "RUN must be at least one run directory"),
        (["serve", str(tmp_path / "none")], "run.json is not there"),
        (["serve", str(runs[0]), "--port", "70000"], "0 to 65535"),
        (["serve", str(runs[0]), "--new-tokens", "0"], "at least 1"),
        (["serve", str(runs[0]), "--port", "0", "--allow-host", "http://hub"], "must be a name"),
        (["serve", str(runs[0]), "--port", "0", "--root-path", "lab/"], "must be a path"),
        (["serve", str(runs[0]), "--port", "0", "--votes", str(tmp_path)], "must be a file, got a folder"),
        (["serve", str(runs[0]), "--host", "203.0.113.1"], "cannot listen"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert said in error
        assert error.count("\n") == 0


def test_a_language_model_explains_a_neuron_once_and_a_refusal_is_reported(runs: list[Path]) -> None:
    pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")
    from fakes.llm_server import Answer, Server, completion

    said = ["The neuron fires on <b>boats</b>.", "I'm sorry, but I cannot help with that."]
    place = {"model": "crate-2l", "tap": "neurons", "layer": 0}
    with Server(lambda _path, _body: Answer(completion(said[0]))) as llm, serve(runs[0], "--llm", llm.url) as found:
        assert found.ask("/data/site.json").json["capabilities"]["explain"]["explainer"]
        first = found.post("/api/explain", place | {"neuron": 9}).json
        asked = len(llm.asked)
        assert "<b>boats</b>" in first["text"]
        assert first["explainer"] == "small"
        assert found.post("/api/explain", place | {"neuron": 9}).json == first
        assert len(llm.asked) == asked
        said[0] = said[1]
        refused = found.post("/api/explain", place | {"neuron": 10}).json
        assert refused["text"] == ""
        assert refused["failure"]
        assert found.post("/api/explain", place | {"neuron": 64}).status == 400
        assert found.post("/api/explain", place | {"neuron": "9"}).status == 400
        assert found.post("/api/explain", place | {"tap": "../../etc", "neuron": 9}).status == 400


def test_exposed_it_asks_for_the_token_that_it_prints(runs: list[Path]) -> None:
    with serve(runs[0], "--host", "0.0.0.0") as found:
        token = found.address.partition("?token=")[2]
        port = found.address.split(":")[2].split("/")[0]
        inside = Served(f"http://127.0.0.1:{port}/", found.process)
        assert inside.ask("/").status == 401
        assert inside.ask("/data/site.json").status == 401
        admitted = inside.ask(f"/?token={token}")
        assert admitted.status == 303
        cookie = admitted.headers["set-cookie"].split(";")[0]
        assert inside.ask("/data/site.json", cookie=cookie).status == 200
