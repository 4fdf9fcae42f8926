"""Each fault of a model server through whole nodes: HTTP in, HTTP out, at once and over a hop.

`direct` is a node with the faulty servers; `a` has none of them, and asks `b`, which has. Each of
them has a healthy server beside for the models that end in `.pair`. All run once for the module, in
a loop of their own, and there the cases run side by side: each has a server of its own, and most of
its time is waiting.
"""

import json
import re
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
import trio
from certificates import self_signed
from daemons import START_S, Daemon, mesh, until
from fault_cases import CASES, LATE_S, REFUSED, Case
from faults import LONG, PARTIAL, WHOLE, FaultBackend, fault_backend, refusing_port

from promptmesh.mesh.breakers import FIRST_PAUSE, LONGEST_PAUSE

pytestmark = pytest.mark.e2e

#: Liveness: all requests of a case, on a busy machine, and all cases of a road.
CASE_S, ROAD_S = 180, 900
#: No node gives up a server before that, but for the providers whose fault is that they are late.
#: The asking node of a hop is told what the other one found.
DEADLINES = f"[deadlines]\nfirst_token = {CASE_S}\ngap = {CASE_S}\nwhole = {CASE_S}\n"
#: So many cases of a road run at once.
AT_ONCE = 4
#: Bytes that an endless answer may cost a node for a while: three of them are read at once.
MOST_MEMORY = 192 << 20
#: Another client is used over TLS. What is in a body is none of its business, and the most of it
#: does not come in the time that a first token has here.
OVER_TLS = [
    case
    for case in CASES
    if not re.match("refused|status|context|error|endless-(line|json)", case.fault)
]
#: The words of our own client, which httpx has others for.
OF_OUR_CLIENT = {"without a reply", "not valid HTTP", "larger than"}
PAIRS = [f"{case.fault}.pair" for case in CASES]
#: Those that embeddings meet, too, and that one needs no second server for.
OF_EMBEDDINGS = [c for c in CASES if not c.begun and c.text is None and c.fault != REFUSED]


def provider(name: str, base_url: str, models: Sequence[str], kind: str = "models") -> str:
    return (
        f'[[providers]]\nkind = "openai_compatible"\nname = "{name}"\nbase_url = "{base_url}"\n'
        f"{kind} = {json.dumps(list(models))}\n"
    )


def patience(case: Case) -> str:
    """Less of it, where it is the fault that a server is late, and only for what is late there."""
    limit = "gap" if case.begun else "first_token"
    return f"deadlines = {{{limit} = {LATE_S}}}\n" * case.late


def healthy(backend: FaultBackend) -> str:
    return provider("healthy", backend.base("healthy"), [*PAIRS, "flapping"]) + "slots = 16\n"


def faulty(backend: FaultBackend, refusing: int, cases: Sequence[Case] = CASES) -> str:
    """A provider for each fault, each with a breaker of its own."""
    tables = []
    for case in cases:
        base = backend.base(case.fault)
        if case.fault == REFUSED:
            base = f"http://127.0.0.1:{refusing}/v1"
            # Nothing holds its requests together, so one of a pair needs a breaker of its own.
            tables.append(provider("refused-too", base, [f"{REFUSED}.pair"]))
        models = [case.fault, f"{case.fault}.pair"][: 1 if case.fault == REFUSED else 2]
        if case.fault == "context-openai":
            models.append(LONG)
        tables.append(provider(case.fault, base, models) + patience(case))
    tables += [provider(name, backend.base(name), [LONG]) for name in ("smaller", "larger")]
    tables.append(provider("flapping", backend.base("flapping"), ["flapping"]))
    return "".join(tables)


def embedding(backend: FaultBackend) -> str:
    """Embeddings with a fault, for the programs of that node only."""
    return "".join(
        provider(f"{case.fault}.embed", backend.base(case.fault), [case.fault], "embedding_models")
        + "share = false\n"
        + patience(case)
        for case in OF_EMBEDDINGS
    )


#: The cases and their roads, without what a peer says before it is asked: that its server refuses
#: connections.
DRIVEN = [(c, r) for c in CASES for r in ("direct", "hop") if (c.fault, r) != (REFUSED, "hop")]
DRIVEN += [(case, "https") for case in OVER_TLS]
DRIVEN += [(case, "embeddings") for case in OF_EMBEDDINGS]


class Road(NamedTuple):
    """The node that is asked, the one that asks the server, and the server."""

    asked: Daemon
    asking: Daemon
    backend: FaultBackend


class World:
    """The nodes and their servers, in a loop of their own, where the cases run."""

    def __init__(self, folder: Path, cases: Iterable[tuple[Case, str]]) -> None:
        self.roads: dict[str, Road] = {}
        self._results: dict[tuple[Case, str], Future[None]] = {case: Future() for case in cases}
        self._folder = folder
        self._token: trio.lowlevel.TrioToken | None = None
        self._up = threading.Event()
        self._down = trio.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "World":
        self._thread.start()
        self._up.wait()
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        with suppress(trio.RunFinishedError):  # `_error` says why it is over
            self._token.run_sync_soon(self._down.set)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def result(self, case: Case, road: str) -> None:
        """Wait for that case, and raise what it raised."""
        self._results[case, road].result(ROAD_S)

    def run(self, function: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Run it in that loop."""

        async def limited() -> None:
            with trio.fail_after(CASE_S):
                await function(*arguments)

        trio.from_thread.run(limited, trio_token=self._token)

    def _run(self) -> None:
        try:
            trio.run(self._live)
        except BaseException as error:  # the fixture raises it
            self._error = error
        finally:
            for result in self._results.values():
                result.cancel()
            self._up.set()

    async def _live(self) -> None:
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self._token = trio.lowlevel.current_trio_token()
            self._up.set()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._drive)
                await self._down.wait()
                nursery.cancel_scope.cancel()

    async def _start(self, stack: AsyncExitStack) -> None:
        at_direct = await stack.enter_async_context(fault_backend())
        at_b = await stack.enter_async_context(fault_backend())
        of_embeddings = await stack.enter_async_context(fault_backend())
        refusing = await stack.enter_async_context(refusing_port())
        pem = self_signed(self._folder / "server.pem")
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(pem)
        at_https = await stack.enter_async_context(fault_backend(tls))
        config = healthy(at_direct) + faulty(at_direct, refusing)
        direct = self._node(stack, "direct", config)
        config = healthy(at_https) + faulty(at_https, refusing, OVER_TLS)
        https = self._node(stack, "https", config, SSL_CERT_FILE=str(pem))
        vectors = self._node(stack, "vectors", embedding(of_embeddings))
        async with trio.open_nursery() as nursery:
            for node in (direct, https, vectors):
                nursery.start_soon(node.start)
        both = {"a": DEADLINES + healthy(at_b), "b": DEADLINES + faulty(at_b, refusing)}
        a, b = await stack.enter_async_context(mesh(self._folder, both))
        await a.wait_for_model(LONG)
        for node in (direct, https, vectors, a):
            await known(node)
        self.roads = {
            "direct": Road(direct, direct, at_direct),
            "hop": Road(a, b, at_b),
            "https": Road(https, https, at_https),
            "embeddings": Road(vectors, vectors, of_embeddings),
        }

    def _node(self, stack: AsyncExitStack, name: str, config: str, **environment: str) -> Daemon:
        node = Daemon(self._folder / name, name, DEADLINES + config, **environment)
        stack.push_async_callback(node.aclose)
        return node

    async def _drive(self) -> None:
        """Run the cases: alone those that memory is counted of, of the others some side by side."""
        limits = {road: trio.CapacityLimiter(AT_ONCE) for road in self.roads}
        for case, road in [each for each in self._results if each[0].endless]:
            await self._settle(case, road, limits[road])
        async with trio.open_nursery() as nursery:
            for case, road in [each for each in self._results if not each[0].endless]:
                nursery.start_soon(self._settle, case, road, limits[road])

    async def _settle(self, case: Case, road: str, limit: trio.CapacityLimiter) -> None:
        result = self._results[case, road]
        function = _fault_of_embeddings if road == "embeddings" else _fault
        async with limit:
            try:
                with trio.fail_after(CASE_S):
                    await function(case, self.roads[road])
            except Exception as error:  # the test of the case raises it
                result.set_exception(error)
            else:
                result.set_result(None)


@pytest.fixture(scope="module")
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """The world with those of the cases that are to be run."""
    chosen = {item.name for item in request.session.items if item.path == request.path}
    driven = [(case, road) for case, road in DRIVEN if f"test_fault[{case.fault}-{road}]" in chosen]
    with World(tmp_path_factory.mktemp("faults"), driven) as world:
        yield world


async def known(node: Daemon) -> None:
    """Until it knows that each server can be asked, but for the one that refuses.

    One whose list of models comes late, as on a busy machine all do now and then, cannot for a
    moment, and that is no case of this table.
    """

    async def seen() -> bool:
        rows = await node.json("/mesh/v1/peers")
        states = {p["name"]: p["state"] for row in rows for p in row["providers"]}
        return bool(states) and all(
            state == ("unavailable" if name.startswith(REFUSED) else "ready")
            for name, state in states.items()
        )

    await until(seen, f"{node.name} sees all servers; {node.log}", START_S)


# --- what a caller sees ---------------------------------------------------------------------------


class Seen(NamedTuple):
    """What a caller got."""

    status: int
    headers: httpx.Headers
    text: str
    finish: str | None
    error: dict[str, Any] | None
    #: It ended as a whole answer does.
    done: bool


async def ask(node: Daemon, model: str, prompt: str, *, stream: bool, **fields: Any) -> Seen:
    response = await node.chat(prompt, model, stream=stream, temperature=0, **fields)
    status, headers = response.status_code, response.headers
    if headers["content-type"] == "application/json":
        body = response.json()
        if status != 200:
            return Seen(status, headers, "", None, body["error"], done=False)
        choice = body["choices"][0]
        text, finish = choice["message"]["content"], choice["finish_reason"]
        return Seen(status, headers, text, finish, None, done=True)
    *events, last = [e.removeprefix("data: ") for e in response.text.rstrip("\n").split("\n\n")]
    done = last == "[DONE]"
    values = [json.loads(e) for e in ([*events] if done else [*events, last])]
    errors = [v["error"] for v in values if "error" in v]
    assert not errors or "error" in values[-1], "nothing follows an error"
    choices = [c for v in values for c in v.get("choices", ())]
    text = "".join(c["delta"].get("content") or "" for c in choices)
    finish = next((c["finish_reason"] for c in choices if c["finish_reason"]), None)
    return Seen(status, headers, text, finish, errors[0] if errors else None, done)


def check(case: Case, seen: Seen, *, streamed: bool) -> None:
    """Is it what the table says?"""
    if case.text is not None:
        assert (seen.status, seen.text, seen.finish) == (200, case.text, case.finish)
        assert seen.error is None
        assert seen.done
        return
    begun = case.begun and streamed
    assert seen.status == (200 if begun else case.status), seen.error
    assert seen.error is not None
    assert not seen.done
    assert seen.finish is None
    assert seen.error["code"] == case.code, seen.error
    at_fault = case.status == 400
    assert seen.error["type"] == ("invalid_request_error" if at_fault else "server_error")
    assert case.says in seen.error["message"], seen.error
    partial = seen.error.get("partial", "")
    assert partial.startswith(PARTIAL) if case.begun else not partial
    if begun:
        assert seen.text == partial
        assert "retry-after" not in seen.headers
    else:
        assert seen.headers["x-promptmesh-attempts"] == "1"
        assert seen.headers.get("retry-after") == (case.retry_after and str(case.retry_after))


# --- the cases ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "road"), DRIVEN, ids=[f"{c.fault}-{r}" for c, r in DRIVEN])
def test_fault(world: World, case: Case, road: str) -> None:
    world.result(case, road)


async def _fault(case: Case, road: Road) -> None:
    backend, got = road.backend, {}
    own = {"deadline_s": case.deadline} if case.deadline else {}
    fields = {"promptmesh": own}
    if case.fault != REFUSED:
        backend.together[case.fault] = 3  # so that no breaker opens before all have failed

    async def one(form: str, *, stream: bool) -> None:
        got[form] = await ask(road.asked, case.fault, form, stream=stream, **fields)

    async def pair() -> None:
        got["pair"] = await _with_a_healthy_one(case, road, own)

    await known(road.asked)
    peak = Peak(road)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: one("whole", stream=False))
        nursery.start_soon(lambda: one("streamed", stream=True))
        nursery.start_soon(pair)
    if road.asking.name == "https" and case.says in OF_OUR_CLIENT:
        case = replace(case, says="")
    check(case, got["whole"], streamed=False)
    check(case, got["streamed"], streamed=True)
    if case.elsewhere and case.text is None:
        assert (got["pair"].status, got["pair"].text) == (200, WHOLE), got["pair"].error
        assert got["pair"].headers["x-promptmesh-provider"] == "healthy"
        assert got["pair"].headers["x-promptmesh-attempts"] == "2"
    else:
        check(case, got["pair"], streamed=False)
    if case.endless:  # it runs alone
        assert peak.growth() < MOST_MEMORY
    await _check_backend(case, backend)
    await _check_stored(case, road)
    await _check_breaker(case, road, fields)


async def _with_a_healthy_one(case: Case, road: Road, own: dict[str, Any]) -> Seen:
    """Ask for a model that a healthy server has, too, until the faulty one's turn has come."""
    model = f"{case.fault}.pair"
    fields = {"promptmesh": own | {"policy": "round_robin"}}
    for number in range(2):
        seen = await ask(road.asked, model, str(number), stream=False, **fields)
        met = road.backend.of(case.fault, model)
        if met or seen.headers.get("x-promptmesh-attempts") != "1":
            break
    return seen


async def _check_backend(case: Case, backend: FaultBackend, *, requests: int = 3) -> None:
    """Each request came once, and whoever was not to go on reading left."""
    met = backend.of(case.fault)
    asked = 0 if case.fault == REFUSED else requests
    # Two callers had no other server. The breaker may let only one of them ask once more.
    assert asked <= len(met) <= asked + (2 if case.again else 0)
    for seen in met:
        await seen.over.wait()
    assert [seen.left for seen in met] == [case.left] * len(met)


async def _check_stored(case: Case, road: Road) -> None:
    """Both nodes of a hop have it before the caller has the end of it, or have it not."""
    for node in {road.asked, road.asking}:
        stored = await node.json(f"/mesh/v1/cache?model={case.fault}")
        assert bool(stored) == case.stored, stored


async def _check_breaker(case: Case, road: Road, fields: dict[str, Any]) -> None:
    """Who has failed so often is left alone; the fault of a request counts against nobody."""
    if case.fault == REFUSED:
        return
    backend = road.backend
    for number in range(3):  # each failure makes the pause longer, so that even we see it
        await known(road.asked)
        before = len(backend.of(case.fault))
        seen = await ask(road.asked, case.fault, f"again {number}", stream=False, **fields)
        asked = len(backend.of(case.fault)) - before
        if not case.paused:
            assert asked == 1
            check(case, seen, streamed=False)
            return
        if not asked:
            assert seen.error is not None
            assert seen.status == 503, seen.error
            assert "is left alone" in seen.error["message"]
            assert seen.headers["x-promptmesh-attempts"] == "0"
            assert int(seen.headers["retry-after"]) >= 1
            return
    raise AssertionError(f"it was asked again each time: {seen.error}")


class Peak:
    """How much memory the nodes of a road take more at their worst."""

    def __init__(self, road: Road) -> None:
        self._processes = [Path(f"/proc/{node.pid}") for node in {road.asked, road.asking}]
        for process in self._processes:
            (process / "clear_refs").write_text("5")  # the peak begins anew
        self._before = self._peaks()

    def growth(self) -> int:
        """Bytes."""
        pairs = zip(self._before, self._peaks(), strict=True)
        return max(after - before for before, after in pairs)

    def _peaks(self) -> list[int]:
        texts = [(process / "status").read_text() for process in self._processes]
        found = [re.search(r"VmHWM:\s+(\d+) kB", text) for text in texts]
        return [int(match[1]) * 1024 for match in found if match]


def test_a_peer_whose_server_refuses_connections_is_not_asked(world: World) -> None:
    world.run(_refused_at_a_peer, world.roads["hop"])


async def _refused_at_a_peer(road: Road) -> None:
    seen = await ask(road.asked, REFUSED, "is it there?", stream=False)
    assert seen.error is not None
    assert (seen.status, seen.headers["x-promptmesh-attempts"]) == (503, "0"), seen.error
    assert "it is unavailable" in seen.error["message"]
    assert "connection refused" in seen.error["message"]


# --- embeddings -----------------------------------------------------------------------------------


async def _fault_of_embeddings(case: Case, road: Road) -> None:
    await known(road.asked)
    async with road.asked.client(timeout=CASE_S) as client:
        body = {"model": case.fault, "input": "Once upon a time."}
        response = await client.post("/v1/embeddings", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (case.status, case.code), error
    assert response.headers.get("retry-after") == (case.retry_after and str(case.retry_after))
    await _check_backend(case, road.backend, requests=1)
    await _check_stored(case, road)


# --- more than one server ------------------------------------------------------------------------


@pytest.mark.parametrize("road", ["direct", "hop"])
def test_a_context_that_is_too_long_asks_only_a_larger_model(world: World, road: str) -> None:
    world.run(_too_long, world.roads[road])


async def _too_long(road: Road) -> None:
    backend = road.backend
    for number in range(20):
        await known(road.asked)
        smaller = len(backend.of("smaller"))
        seen = await ask(road.asked, LONG, f"long {number}", stream=False)
        if backend.of("context-openai", LONG):
            break
    # It was asked, did not fit, and the larger one answered, however small the others are.
    assert (seen.status, seen.text) == (200, WHOLE), seen.error
    assert seen.headers["x-promptmesh-provider"] == "larger"
    assert len(backend.of("smaller")) == smaller


@pytest.mark.parametrize("road", ["direct", "hop"])
def test_a_flapping_server_is_served_around_and_used_again_soon(world: World, road: str) -> None:
    world.run(_flapping, world.roads[road])


async def _flapping(road: Road) -> None:
    backend = road.backend

    async def who() -> str:
        """Who answers now: somebody does, always."""
        await known(road.asked)
        prompt = f"{trio.current_time()}"
        seen = await ask(road.asked, "flapping", prompt, stream=False)
        assert (seen.status, seen.text) == (200, WHOLE), seen.error
        return str(seen.headers["x-promptmesh-provider"])

    async def used() -> bool:
        return await who() == "flapping"

    for _ in range(2):
        await until(used, "the server is used", CASE_S / 4)
        backend.up = False
        before, since = len(backend.of("flapping")), trio.current_time()
        for _ in range(20):
            assert not await used()
        # Two until it is left alone, and a probe after each pause.
        most = max(5, 2 + _pauses_within(trio.current_time() - since))
        assert 1 <= len(backend.of("flapping")) - before <= most
        backend.up = True
    await until(used, "the server is used again", CASE_S / 4)


def _pauses_within(seconds: float) -> int:
    """How many pauses of a breaker may have ended by then: each is longer than the one before."""
    ended, pause = 0, FIRST_PAUSE
    while (seconds := seconds - pause) > 0:
        ended, pause = ended + 1, min(2 * pause, LONGEST_PAUSE)
    return ended


# --- a client of the dialect ----------------------------------------------------------------------


def test_a_client_library_sees_that_a_stream_broke(world: World) -> None:
    url = world.roads["hop"].asked.url + "/v1"
    texts = []
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="filter-event",
            messages=[{"role": "user", "content": "by the library"}],
            stream=True,
        )
        with pytest.raises(openai.APIError, match="content management policy") as raised, stream:
            texts += [c.choices[0].delta.content or "" for c in stream]
    assert raised.value.code == "content_filter"
    assert isinstance(raised.value.body, dict)
    assert raised.value.body["partial"] == PARTIAL
