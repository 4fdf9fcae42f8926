"""Model servers of this machine are found, and go; whatever else listens there is left alone."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from daemons import until
from fakes_cli import made, run
from fakes_http import Received, Script, ServerSide, json_reply, reply, scripted_server
from ports import free_port

from promptmesh.node import finding_servers
from promptmesh.node.config_providers import LocalServersConfig, ProviderConfig
from promptmesh.node.config_sections import Config
from promptmesh.node.finding_servers import ServerFinder, find_servers, found_tables, ports_of
from promptmesh.node.own_providers import OwnProviders
from promptmesh.providers.local_servers import look

PAGE = reply(200, "<h1>Hello</h1>", "Content-Type: text/html")


def models(owner: str, *more: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"object": "list", "data": [{"id": "m", "owned_by": owner, **dict(*more)}]}


#: What each server answers, by path (`reference` of each: its own documentation).
SERVERS: dict[str, dict[str, Any]] = {
    "vllm": {"/v1/models": models("vllm", {"max_model_len": 4096}), "/version": {"version": "1"}},
    "sglang": {"/v1/models": models("sglang"), "/get_model_info": {"model_path": "m"}},
    "ollama": {"/v1/models": models("library"), "/api/version": {"version": "0.9"}},
    "llama_cpp": {"/v1/models": models("llamacpp"), "/props": {}},
    "lm_studio": {
        "/v1/models": models("organization_owner"),
        "/api/v0/models": {"data": []},
    },
}
#: Those that do not say in their list who they are.
SILENT: dict[str, dict[str, Any]] = {
    "vllm": {"/v1/models": models("me"), "/version": {"version": "1"}},
    "sglang": {"/v1/models": models("me"), "/get_model_info": {"model_path": "m"}},
    "ollama": {"/v1/models": {"object": "list", "data": []}, "/api/version": {"version": "0.9"}},
    "llama_cpp": {"/v1/models": models("me"), "/props": {"default_generation_settings": {}}},
    "server": {"/v1/models": models("somebody")},
}


def by_path(answers: Mapping[str, Any]) -> Script:
    async def script(side: ServerSide) -> None:
        while (received := await side.request_or_end()) is not None:
            known = answers.get(received.path)
            await side.send(json_reply(404, {}) if known is None else json_reply(200, known))

    return script


def each(answer: Callable[[Received], bytes]) -> Script:
    async def script(side: ServerSide) -> None:
        while (received := await side.request_or_end()) is not None:
            await side.send(answer(received))

    return script


@pytest.mark.parametrize(
    ("kind", "answers"), [*SERVERS.items(), *((kind, each) for kind, each in SILENT.items())]
)
async def test_each_server_is_known_by_its_answers(kind: str, answers: dict[str, Any]) -> None:
    async with scripted_server(by_path(answers)) as server:
        looked = await look(server.port)
    assert looked.found is not None
    assert (looked.found.kind, looked.found.base_url) == (kind, server.base_url)
    assert {received.method for received in server.requests} == {"GET"}


OTHERS: dict[str, Script] = {
    "a web page for any path": each(lambda received: PAGE),
    "JSON that is no list of models": by_path({"/v1/models": {"models": ["m"]}}),
    "a shop": by_path({"/v1/models": {"data": [{"sku": 1}]}}),
    "one that wants a key": each(lambda received: json_reply(401, {"error": "key"})),
    "nonsense": each(lambda received: b"SSH-2.0-OpenSSH\r\n"),
}


@pytest.mark.parametrize("what", OTHERS)
async def test_another_service_is_asked_one_harmless_question(what: str) -> None:
    async with scripted_server(OTHERS[what]) as server:
        looked = await look(server.port)
    assert looked.taken
    assert looked.found is None
    assert [(r.method, r.path) for r in server.requests] == [("GET", "/v1/models")]


async def test_a_node_is_no_model_server() -> None:
    answers = {"/v1/models": models("vllm"), "/mesh/v1/status": {"peer": "12D3", "node": "a"}}
    async with scripted_server(by_path(answers)) as server:
        assert (await look(server.port)).found is None


async def test_nothing_and_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promptmesh.providers.local_servers.TIME", 0.2)

    async def silent(side: ServerSide) -> None:
        await side.request_or_end()
        await side.request_or_end()

    async with scripted_server(silent) as server:
        looked = await look(server.port)
    assert (looked.found, looked.taken) == (None, True)
    assert await look(server.port) == (None, False)


def config_of(*ports: int, providers: tuple[ProviderConfig, ...] = (), **fields: Any) -> Config:
    servers = LocalServersConfig(ports=tuple(map(str, ports)), **fields)
    return Config(local_servers=servers, providers=providers)


def test_a_table_of_the_same_address_wins() -> None:
    table = ProviderConfig(
        kind="openai_compatible",
        name="mine",
        share=True,
        options={"base_url": "http://localhost:8000/v1"},
    )
    assert ports_of(config_of(8000, 8080, 8080, providers=(table,))) == [8080]
    assert ports_of(config_of(8000, enabled=False)) == []


async def test_two_of_a_kind_have_names_of_their_own() -> None:
    async with (
        scripted_server(by_path(SERVERS["ollama"])) as one,
        scripted_server(by_path(SERVERS["ollama"])) as two,
    ):
        config = config_of(one.port, two.port, share=False)
        tables = found_tables(await find_servers(config), config)
    assert [table.name for table in tables] == ["ollama", f"ollama-{two.port}"]
    assert not any(table.share for table in tables)


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_FREE", "LOOK_TAKEN", "LOOK_FOUND"):
        monkeypatch.setattr(finding_servers, name, 0.02)


@asynccontextmanager
async def serving(port: int, script: Script) -> AsyncIterator[None]:
    """A server on that port, which ends with the block."""
    (listener,) = await trio.open_tcp_listeners(port, host="127.0.0.1")

    class Requests:
        requests: list[Received] = []  # noqa: RUF012 (one block, one list)

    async def handle(stream: trio.abc.Stream) -> None:
        async with stream:
            await script(ServerSide(stream, Requests()))  # type: ignore[arg-type]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.serve_listeners, handle, [listener]))
        yield
        nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("hurry")
async def test_a_server_comes_and_goes_while_the_node_runs() -> None:
    port = free_port()
    providers, changes = OwnProviders([]), []
    providers.on_change.append(lambda: changes.append([own.name for own in providers]))

    async def offered(*names: str) -> bool:
        return [own.name for own in providers] == list(names)

    async with trio.open_nursery() as nursery:
        await nursery.start(providers.run)
        nursery.start_soon(ServerFinder(config_of(port), providers).run)
        await trio.testing.wait_all_tasks_blocked()
        assert await offered()
        async with serving(port, by_path(SERVERS["ollama"])):
            await until(partial(offered, "ollama"), "it is found")
            (own,) = providers
            assert (own.shared, own.paid) == (True, False)

            async def ready() -> bool:
                return own.health.state == "ready" and bool(own.admission.models())

            await until(ready, "its models are known")
            assert [backend.name for backend in providers.backends()] == ["ollama"]
            assert [advert.name for advert in providers.adverts()] == ["ollama"]
        await until(offered, "it is gone")
        assert providers.backends() == []
        async with serving(port, by_path(SERVERS["vllm"])):
            await until(partial(offered, "vllm"), "another is found in its place")
        nursery.cancel_scope.cancel()
    assert ["ollama"] in changes
    assert [] in changes


@pytest.mark.usefixtures("hurry")
async def test_one_that_is_not_ready_for_a_moment_stays() -> None:
    failures = iter([False] * 4 + [True] * 2)

    def answer(received: Received) -> bytes:
        if received.path == "/v1/models" and next(failures, False):
            return json_reply(503, {})
        known = SERVERS["llama_cpp"].get(received.path)
        return json_reply(404, {}) if known is None else json_reply(200, known)

    providers = OwnProviders([])
    async with scripted_server(each(answer)) as server, trio.open_nursery() as nursery:
        await nursery.start(providers.run)
        nursery.start_soon(ServerFinder(config_of(server.port), providers).run)

        async def asked() -> bool:
            return sum(r.path == "/v1/models" for r in server.requests) > 12

        await until(asked, "it is asked again and again")
        assert [own.name for own in providers] == ["llama_cpp"]
        asked_who = [r.path for r in server.requests if r.path == "/mesh/v1/status"]
        assert asked_who
        nursery.cancel_scope.cancel()


async def test_init_says_what_it_found(tmp_path: Path) -> None:
    async with scripted_server(by_path(SERVERS["lm_studio"])) as server:
        ran = await trio.to_thread.run_sync(
            lambda: run(
                made(tmp_path).path,
                "init",
                PROMPTMESH_LOCAL_SERVERS_ENABLED="true",
                PROMPTMESH_LOCAL_SERVERS_PORTS=str(server.port),
            )
        )
    assert ran.code == 0
    assert f"found  lm_studio at 127.0.0.1:{server.port} (m)" in ran.err
