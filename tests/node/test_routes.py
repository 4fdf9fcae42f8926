"""Who may ask, and which handler answers."""

from collections.abc import AsyncIterator

import httpx
import pytest
from serving import serving

from promptmesh.node.http_server import Request, Responder
from promptmesh.node.routes import ANY, Routes, foreign


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:7411", None),
        ("localhost:7411", None),
        ("[::1]:7411", "http://localhost:3000"),
        ("app.localhost", "http://127.0.0.1:8080"),
    ],
)
def test_programs_of_this_machine_may_ask(host: str, origin: str | None) -> None:
    assert foreign(host, origin) is None


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("evil.example", None),
        ("evil.example:7411", "http://evil.example:7411"),
        ("127.0.0.1.evil.example", None),
        ("127.0.0.1", "https://evil.example"),
        ("127.0.0.1", "null"),
        ("", None),
        ("localhost.evil.example", None),
    ],
)
def test_pages_of_others_may_not(host: str, origin: str | None) -> None:
    assert foreign(host, origin)


async def say(request: Request, responder: Responder, rest: str = "") -> None:
    await responder.send(200, f"{request.method} {rest}".encode(), content_type="text/plain")


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    routes = Routes()
    routes.add("GET", "/one", say)
    routes.add("POST", "/one", say)
    routes.add("POST", "/many/of/them", say)
    routes.add_below("GET", "/many/", say)
    routes.add_below(ANY, "/all/", say)
    async with serving(routes) as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/one", "GET "),
        ("POST", "/one", "POST "),
        ("HEAD", "/one", ""),
        ("GET", "/many/more", "GET more"),
        ("HEAD", "/many/more", ""),
        ("POST", "/many/of/them", "POST "),
        ("OPTIONS", "/all/x", "OPTIONS x"),
        ("PATCH", "/all/x", "PATCH x"),
    ],
)
async def test_a_handler_answers(
    client: httpx.AsyncClient, method: str, path: str, body: str
) -> None:
    answer = await client.request(method, path)
    assert (answer.status_code, answer.text) == (200, body)


@pytest.mark.parametrize(
    ("method", "path", "takes", "allowed"),
    [
        ("PUT", "/one", "GET, POST", "GET, HEAD, OPTIONS, POST"),
        ("GET", "/many/of/them", "POST", "OPTIONS, POST"),
        ("HEAD", "/many/of/them", "POST", "OPTIONS, POST"),
        ("DELETE", "/many/more", "GET", "GET, HEAD, OPTIONS"),
    ],
)
async def test_another_method_is_told_which_are_taken(
    client: httpx.AsyncClient, method: str, path: str, takes: str, allowed: str
) -> None:
    answer = await client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    if method != "HEAD":
        error = {"message": f"{path} takes {takes}", "type": "invalid_request_error"}
        assert answer.json() == {"error": error}
    told = await client.options(path, headers={"origin": "http://localhost:3000"})
    assert (told.status_code, told.headers["allow"], told.content) == (204, allowed, b"")
    assert not [name for name in told.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("path", ["/", "/two", "/one/", "/many/", "/ONE"])
async def test_what_there_is_not(client: httpx.AsyncClient, path: str) -> None:
    for method in ("GET", "OPTIONS"):
        answer = await client.request(method, path)
        assert answer.status_code == 404
        assert "/all/..., /many/..., /many/of/them, /one" in answer.json()["error"]["message"]


async def test_pages_of_others_are_not_told_what_there_is(client: httpx.AsyncClient) -> None:
    answer = await client.options("/one", headers={"origin": "https://evil.example"})
    assert answer.status_code == 403
    assert "allow" not in answer.headers
