"""The checks before the handlers of a live browser, the parsing of requests, and votes."""

import asyncio
import json
from typing import Any

import pytest

from cratelm.commands.serve import LOOPBACK, Options, check_addresses
from cratelm.errors import CrateError
from cratelm.report.server.guard import COOKIE, Guard
from cratelm.report.server.requests import Limits, read_steer_request, read_text_request
from cratelm.report.server.votes import Votes

HOST = "127.0.0.1:8080"


async def echo(_scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body it got."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def guard(app: Any = echo, **options: Any) -> Guard:
    given: dict[str, Any] = {
        "hosts": LOOPBACK,
        "access": None,
        "requests": 2,
        "body_bytes": 100,
        "policy": "p",
    } | options
    return Guard(app, **given)


async def ask(
    app: Guard, method: str = "GET", path: str = "/", query: str = "", parts: tuple[bytes, ...] = (b"",),
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:  # fmt: skip
    sent: list[Any] = []
    waiting = [{"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)]

    async def receive() -> Any:
        return waiting.pop(0) if waiting else await asyncio.Event().wait()  # the client waits for the answer

    async def send(message: Any) -> None:
        sent.append(message)

    named = {"host": HOST} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": "http", "method": method, "path": path, "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in named.items()],
    }  # fmt: skip
    await app(scope, receive, send)
    head = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], head, b"".join(one.get("body", b"") for one in sent[1:])


def one(app: Guard, method: str = "GET", **options: Any) -> tuple[int, dict[str, str], bytes]:
    return asyncio.run(ask(app, method, **options))


def ours(app: Guard) -> dict[str, str]:
    return {"content_type": "application/json", "x_cratelm_token": app.page_token}


def test_every_answer_carries_the_policy() -> None:
    for found in (one(guard()), one(guard(), host="evil.example")):
        assert found[1]["content-security-policy"] == "p"
        assert found[1]["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1:8080.evil.example", ""])
def test_another_host_is_refused(host: str) -> None:
    status, _, body = one(guard(), host=host)
    assert status == 421
    assert "its own address" in json.loads(body)["error"]


def test_a_write_needs_the_token_of_the_page_json_and_the_same_site() -> None:
    app = guard()
    assert one(app, "POST", parts=(b"hello",), **ours(app))[::2] == (200, b"hello")
    wrong: list[dict[str, str]] = [
        {}, ours(app) | {"x_cratelm_token": "guess"}, ours(app) | {"x_cratelm_token": ""},
        ours(app) | {"content_type": "text/plain"}, ours(app) | {"sec_fetch_site": "cross-site"},
        ours(app) | {"sec_fetch_site": "same-site"},
    ]  # fmt: skip
    for headers in wrong:
        assert one(app, "POST", **headers)[0] == 403, headers
    assert ours(guard())["x_cratelm_token"] != app.page_token


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"])
def test_other_methods_are_refused(method: str) -> None:
    app = guard()
    assert one(app, method, **ours(app))[0] == 405


def test_a_large_body_is_refused_with_and_without_a_length_header() -> None:
    app = guard()
    assert one(app, "POST", content_length="101", **ours(app))[0] == 413
    assert one(app, "POST", parts=(b"x" * 60, b"x" * 60), **ours(app))[0] == 413
    assert one(app, "POST", parts=(b"x" * 50, b"x" * 50), **ours(app))[0] == 200
    assert app.under_way == 0


def test_a_body_that_does_not_arrive_makes_room_again() -> None:
    async def dripping() -> list[int]:
        app, sent = guard(body_seconds=0.05), list[Any]()
        scope = {
            "type": "http", "method": "POST", "path": "/", "query_string": b"",
            "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in ({"host": HOST} | ours(app)).items()],
        }  # fmt: skip

        async def receive() -> Any:
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        async with asyncio.timeout(5):
            await app(scope, receive, send)
        return [sent[0]["status"], app.under_way]

    assert asyncio.run(dripping()) == [408, 0]


def test_access_by_token_only_and_the_token_leaves_the_address() -> None:
    app = guard(hosts=None, access="s3cret")
    assert one(app)[0] == 401
    assert one(app, query="token=wrong")[0] == 401
    status, head, _ = one(app, query="token=s3cret")
    assert (status, head["location"]) == (303, "./")
    own = f"{COOKIE}_8080"
    assert head["set-cookie"].startswith(f"{own}=s3cret;")
    assert "HttpOnly" in head["set-cookie"]
    assert "SameSite=strict" in head["set-cookie"]
    assert one(app, cookie=f"{own}=s3cret")[0] == 200
    assert one(app, cookie=f"{own}=other")[0] == 401
    assert one(app, cookie="=;;=\x00broken")[0] == 401
    assert one(app, "POST", query="token=s3cret", **ours(app))[0] == 401


def test_the_token_leaves_the_address_of_who_is_let_in_already_too() -> None:
    app = guard(hosts=None, access="s3cret")
    for token in ("s3cret", "of+another+start"):
        status, head, _ = one(app, query=f"token={token}", cookie=f"{COOKIE}_8080=s3cret")
        assert (status, head["location"]) == (303, "./")
    assert one(app, path="/api/search", query="q=token", cookie=f"{COOKIE}_8080=s3cret")[0] == 200


def test_two_servers_on_one_host_let_the_same_browser_in() -> None:
    servers, jar = {"host:8080": "first", "host:8081": "second", "host": "third"}, dict[str, str]()
    for host, access in servers.items():
        head = one(guard(hosts=None, access=access), query=f"token={access}", host=host)[1]
        name, _, value = head["set-cookie"].partition(";")[0].partition("=")
        jar[name] = value
    cookie = "; ".join(f"{name}={value}" for name, value in jar.items())
    for host, access in servers.items():
        assert one(guard(hosts=None, access=access), host=host, cookie=cookie)[0] == 200


def test_who_is_not_let_in_is_not_kept_connected() -> None:
    assert one(guard(hosts=None, access="s3cret"))[1]["connection"] == "close"
    assert one(guard(), host="evil.example")[1]["connection"] == "close"
    assert "connection" not in one(guard())[1]


@pytest.mark.parametrize("port", ["", ":80", ":8080", ":9000"])
def test_this_machine_is_answered_at_every_port_and_other_names_are_refused(port: str) -> None:
    """A tunnel (`ssh -L 9000:localhost:8080`) changes the port."""
    for name in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]"):
        assert one(guard(), host=name + port)[0] == 200
    for name in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]", ""):
        assert one(guard(), host=name + port)[0] == 421
    assert one(guard(hosts=[*LOOPBACK, "hub.example"]), host=f"hub.example{port}")[0] == 200


@pytest.mark.parametrize("host", ["localhost:x", "localhost:80:80", "localhost@evil.example", "[::1", "::1:"])
def test_a_host_that_is_not_a_name_and_a_port_is_refused(host: str) -> None:
    assert one(guard(), host=host)[0] == 421


def test_a_proxys_prefix_may_stay_in_the_path_or_not() -> None:
    paths: list[str] = []

    async def note(scope: Any, receive: Any, send: Any) -> None:
        paths.append(scope["path"])
        await echo(scope, receive, send)

    app = guard(note, root_path="/user/a%40b")
    for path in ("/user/a@b/api/search", "/api/search", "/user/a@b/", "/user/a@bc"):
        assert one(app, path=path)[0] == 200
    assert paths == ["/api/search", "/api/search", "/", "/user/a@bc"]
    status, head, _ = one(app, path="/user/a@b")
    assert (status, head["location"]) == (307, "/user/a%40b/")


def test_behind_a_proxy_the_token_leads_to_the_start_of_its_prefix() -> None:
    app = guard(access="s3cret", root_path="/lab")
    _, head, _ = one(app, path="/lab/", query="token=s3cret")
    assert head["location"] == "/lab/"
    assert "; Path=/lab;" in head["set-cookie"]
    for path, start in (("/", "./"), ("/api/search", "../")):  # a prefix that the proxy took away
        assert one(guard(access="s3cret"), path=path, query="token=s3cret")[1]["location"] == start


def test_names_and_prefixes_that_no_request_can_have_are_refused() -> None:
    check_addresses(Options(runs=(), allow_host=("hub.example.org", "[fe80::1]"), root_path="/user/a%40b/proxy/8080"))
    for wrong in ("https://hub.example.org", "hub:80", "", "*"):
        with pytest.raises(CrateError, match="--allow-host must be a name"):
            check_addresses(Options(runs=(), allow_host=(wrong,)))
    for wrong in ("lab", "/", "/lab/", "//evil.example", "/a b", "/a\r\nb"):
        with pytest.raises(CrateError, match="--root-path must be a path"):
            check_addresses(Options(runs=(), root_path=wrong))


def test_a_request_that_is_cancelled_gets_an_answer() -> None:
    """At the server's end; a traceback in the terminal would be the alternative."""

    async def stopped() -> int:
        async def wait(_scope: Any, _receive: Any, _send: Any) -> None:
            await asyncio.sleep(60)

        asking = asyncio.create_task(ask(guard(wait)))
        await asyncio.sleep(0.01)
        asking.cancel()
        return (await asking)[0]

    assert asyncio.run(stopped()) == 503


def test_more_requests_than_allowed_get_retry_after() -> None:
    async def many() -> list[int]:
        gate = asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await gate.wait()
            await echo(scope, receive, send)

        app = guard(slow, requests=2)
        first = [asyncio.create_task(ask(app)) for _ in range(2)]
        await asyncio.sleep(0)
        status, head, _ = await ask(app)
        assert head["retry-after"] == "2"
        gate.set()
        return [status, *(found[0] for found in await asyncio.gather(*first)), (await ask(app))[0]]

    assert asyncio.run(many()) == [429, 200, 200, 200]


@pytest.mark.parametrize(
    "change",
    [
        {"text": ""}, {"text": None}, {"text": "x" * 4001}, {"model": 3}, {"tokens": 0}, {"tokens": 201},
        {"tokens": True}, {"tokens": 1.5}, {"temperature": -1}, {"temperature": float("nan")}, {"temperature": "hot"},
        {"seed": -1}, {"seed": 2**40}, {"changes": {}}, {"changes": [1]}, {"changes": [{"layer": 0}]},
        {"changes": [{"layer": 0, "neuron": 0, "how": "clamp"}]}, {"changes": [{"layer": -1, "neuron": 0}]},
        {"changes": [{"layer": 0, "neuron": 0, "strength": float("inf")}]},
        {"changes": [{"layer": 0, "neuron": 0, "how": "scale", "of_maximum": True}]},
        {"changes": [{"layer": 0, "neuron": 0}] * 13}, {"changes": [{"layer": 0, "neuron": 0, "strength": 10**400}]},
        {"temperature": 1e-300},
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_in_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(CrateError) as refused:
        read_steer_request({"model": "m", "text": "a text"} | change, Limits())
    assert "\n" not in str(refused.value)


def test_requests_are_read() -> None:
    asked = read_steer_request(
        {"model": "m", "text": "a\ud800b", "changes": [{"layer": 1, "neuron": 85, "strength": 2, "of_maximum": True}]},
        Limits(),
    )
    assert asked.text == "a?b"
    assert str(asked.changes[0].resolve(1.5)) == "1/85=set:3"
    assert read_text_request({"model": "m", "text": "t", "layer": 0, "neuron": 3}, Limits()).neuron == 3
    with pytest.raises(CrateError, match="must have layer too"):
        read_text_request({"model": "m", "text": "t", "neuron": 3}, Limits())


def test_votes_are_saved_and_other_values_are_refused(tmp_path: Any) -> None:
    votes = Votes(tmp_path / "new" / "votes.sqlite")
    assert votes.page() == ([], None)
    vote = {"date": "2026", "a": "m/layer/0/neuron/1", "b": "n", "explanations": ["<b>", "y"], "explainers": ["lookup"],
            "choice": "a", "more": "left out"}  # fmt: skip
    assert votes.add(vote) == 1
    assert votes.add(vote | {"choice": "same"}) == 2
    assert [one["choice"] for one in votes.page()[0]] == ["a", "same"]
    assert "more" not in votes.page()[0][0]
    for wrong in ({"choice": "c"}, {"a": 3}, {"explanations": [3]}, {"a": "x" * 5000}):
        with pytest.raises(CrateError, match="vote"):
            votes.add(vote | wrong)
    assert len(votes.page()[0]) == 2
    votes.path.write_text("no database")
    with pytest.raises(CrateError, match="is not a votes file"):
        votes.page()


def test_votes_are_read_in_pages_and_a_full_file_takes_none(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cratelm.report.server.votes.PAGE", 3)
    votes, found = Votes(tmp_path / "votes.sqlite"), list[Any]()
    after: int | None = 0
    vote = {"date": "", "a": "a", "b": "b", "explanations": ["x" * 3000], "explainers": [], "choice": "a"}
    for number in range(7):
        assert votes.add(vote | {"date": str(number)}) == number + 1
    while after is not None:
        page, after = votes.page(after)
        assert len(page) <= 3
        found += page
    assert [one["date"] for one in found] == list("0123456")
    assert votes.page(7) == ([], None)
    size = votes.path.stat().st_size
    monkeypatch.setattr("cratelm.report.server.votes.MOST_BYTES", size)
    with pytest.raises(CrateError, match="is full"):
        votes.add(vote)
    assert votes.path.stat().st_size == size


def test_a_votes_file_that_is_not_writable_is_reported_at_once(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "votes.sqlite", tmp_path, tmp_path / "file" / "deeper" / "votes.sqlite"):
        with pytest.raises(CrateError, match="--votes FILE|must be a file, got a folder"):
            Votes(path).open()
    votes = Votes(tmp_path / "new" / "votes.sqlite")
    votes.open()
    votes.open()
    assert votes.page() == ([], None)
