"""Nodes that fail by a seeded schedule while they are asked, and what must hold all the same."""

from __future__ import annotations

import json
import math
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any, Literal, Self

import h11
import httpx
import trio
from daemons import Daemon, until
from lan import Lan, Machine, lan
from ports import free_port

ASKERS, OTHERS = ("a", "b", "c"), ("d", "e", "f")
NODES = (*ASKERS, *OTHERS)
PORT = 7412
#: `a` has no provider, so that whatever it is asked goes to a peer.
_ECHO = '[[providers]]\nkind = "echo"\nname = "echo"\nshare = true\nslots = 16\n'
_CONFIG = {name: "" if name == "a" else _ECHO for name in NODES}
POLICIES = ("round_robin", "least_loaded", "best_performance")
#: Words of several bytes too, that a cut in the wrong place would break.
WORDS = ("naïve", "猫が", "plain", "🦊🐢", "Ω", "tail-of-it")

Kind = Literal["kill", "restart", "stop", "cut", "split"]
#: Without network namespaces no cable can be pulled.
KINDS: Sequence[Kind] = ("kill", "restart", "stop", "cut", "split")
LOOPBACK_KINDS: Sequence[Kind] = ("kill", "restart", "stop")
#: The longest that a fault lasts (s), where nothing else is said.
LONGEST = 8.0
#: Seconds that a client gets, and how much later the answer or the error may be: the node that it
#: asks may have been stopped meanwhile, and the machine is busy.
DEADLINE, SLACK = 25.0, 90.0
#: Liveness bounds (s) once all faults are over.
HEALED_IN, IDLE_IN = 180, 180
#: What a node may hold more of in the end than in the beginning: descriptors; memory in MB.
MORE_FILES, MORE_MB = 24, 96


# --- what happens


@dataclass(frozen=True)
class Fault:
    """Something that befalls nodes `at` seconds after the beginning, and is over after `lasts`."""

    at: float
    kind: Kind
    nodes: tuple[str, ...]
    lasts: float

    def __str__(self) -> str:
        return f"{self.at:5.1f} s: {self.kind} {' '.join(self.nodes)} for {self.lasts:.1f} s"


def schedule(
    rng: Random, seconds: float, kinds: Sequence[Kind], *, longest: float = LONGEST
) -> list[list[Fault]]:
    """Two sequences of faults, which go on at the same time. Three of each have every kind."""
    order = rng.sample(kinds, len(kinds))
    return [list(_sequence(rng, seconds, each, longest)) for each in (order, order[::-1])]


def _sequence(
    rng: Random, seconds: float, kinds: Sequence[Kind], longest: float
) -> Iterable[Fault]:
    at = rng.uniform(1.0, 3.0)
    for kind in cycle(kinds):
        lasts = rng.uniform(1.0, longest)
        if at + lasts > seconds:
            return
        yield Fault(at, kind, _victims(rng, kind), lasts)
        at += lasts + rng.uniform(0.5, 3.0)


def _victims(rng: Random, kind: Kind) -> tuple[str, ...]:
    if kind == "split":
        return tuple(sorted(rng.sample(NODES, rng.choice((2, 3)))))
    # The clients of a node die with it, so those that are asked are not killed.
    return (rng.choice(OTHERS if kind in ("kill", "restart") else NODES),)


@dataclass(frozen=True)
class Question:
    """A streamed request, with the answer that it must have if it has one."""

    number: int
    at: float
    node: str
    policy: str
    prompt: str
    expected: str
    finish_reason: str
    fields: Mapping[str, Any]
    #: The client goes after so many events.
    leaves_after: int | None = None

    def __str__(self) -> str:
        return f"request {self.number} at {self.at:.1f} s to {self.node} ({self.policy})"


def questions(
    rng: Random, count: int, seconds: float, *, first: int = 0, ask: Sequence[str] = ASKERS
) -> list[Question]:
    """Requests over that time; some equal to the one before, some whose client leaves."""
    found: list[Question] = []
    subject = first
    times = sorted(rng.uniform(0.0, seconds) for _ in range(count))
    for number, at in enumerate(times, start=first):
        subject = subject if rng.random() < 0.15 else number
        found.append(_question(rng, number, at, subject, rng.choice(ask)))
    return found


def _question(rng: Random, number: int, at: float, subject: int, node: str) -> Question:
    same = Random(subject)  # so that equal questions are equal
    length, gap = same.randint(20, 80), same.choice((0.02, 0.04, 0.06))
    text = [f"question-{subject}", *same.sample(WORDS, 4)]
    words = [text[i % len(text)] for i in range(length)]
    fields: dict[str, Any] = {"temperature": 0} if same.random() < 0.5 else {}
    reason = "stop"
    if same.random() < 0.2:
        words, reason = words[: length // 2], "length"
        fields["max_tokens"] = len(words)
    return Question(
        number=number,
        at=at,
        node=node,
        policy=rng.choice(POLICIES),
        prompt=f"{' '.join(text)} [[echo n={length} gap_s={gap} first_s=0.1]]",
        expected=" ".join(words),
        finish_reason=reason,
        fields=fields,
        leaves_after=rng.randint(1, 15) if rng.random() < 0.07 else None,
    )


# --- the nodes


class Node(Daemon):
    """A daemon with a machine and an address of its own, at which it stays."""

    def __init__(self, home: Path, name: str, config: str, machine: Machine | None) -> None:
        super().__init__(home, name, config)
        self._machine = machine
        host, port = (machine.address, PORT) if machine else ("127.0.0.1", free_port())
        self._listen = f"/ip4/{host}/tcp/{port}"
        #: Open descriptors and resident memory (MB) before anything went wrong.
        self.files, self.memory = 0, 0.0

    def _command(self, *arguments: str) -> list[str]:
        command = super()._command(*arguments)
        return self._machine.command(*command) if self._machine else command

    async def start(self, *arguments: str) -> Node:
        await super().start("--listen", self._listen, *arguments)
        return self

    def holds(self) -> tuple[int, float]:
        """Its open descriptors, and its resident memory (MB)."""
        process = Path(f"/proc/{self.pid}")
        (resident,) = (
            line.split()[1]
            for line in (process / "status").read_text().splitlines()
            if line.startswith("VmRSS:")
        )
        return len(list((process / "fd").iterdir())), int(resident) / 1024

    async def get(self, path: str, **options: Any) -> httpx.Response:
        with trio.fail_after(120):
            async with self.exchange("GET", path) as reply:
                return httpx.Response(reply.status, content=await reply.rest())

    @asynccontextmanager
    async def exchange(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Reply]:
        """One request. Leaving closes the connection, as a client that goes."""
        host, port = self.url.removeprefix("http://").split(":")
        if self._machine:
            connection = await self._machine.connect(host, int(port))
        else:
            connection = await trio.open_tcp_stream(host, int(port))
        async with connection:
            http = h11.Connection(h11.CLIENT)
            headers = [("host", host), ("content-length", str(len(body))), ("connection", "close")]
            sent = http.send(h11.Request(method=method, target=path, headers=headers))
            sent = (sent or b"") + (http.send(h11.Data(data=body)) or b"")
            await connection.send_all(sent + (http.send(h11.EndOfMessage()) or b""))
            reply = Reply(connection, http)
            await reply.begin()
            yield reply


class Reply:
    """What a node answers, as it comes."""

    def __init__(self, connection: trio.SocketStream, http: h11.Connection) -> None:
        self._connection = connection
        self._http = http
        self._buffer = b""
        self.status = 0

    async def begin(self) -> None:
        event = await self._event()
        assert isinstance(event, h11.Response), event
        self.status = event.status_code

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """The data of the next server-sent event, up to the end of the body, which must be whole.

        Not by a generator: those complain when a client leaves in the middle, as some do here.
        """
        while b"\n\n" not in self._buffer:
            event = await self._event()
            if not isinstance(event, h11.Data):
                assert self._buffer == b"", self._buffer
                raise StopAsyncIteration
            self._buffer += event.data
        data, self._buffer = self._buffer.split(b"\n\n", 1)
        return data.removeprefix(b"data: ")

    async def rest(self) -> bytes:
        body = b""
        while isinstance(event := await self._event(), h11.Data):
            body += event.data
        return body

    async def _event(self) -> Any:
        """The next event. Raises `h11.RemoteProtocolError` where the message was cut off."""
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._connection.receive_some())
        return event


@asynccontextmanager
async def nodes(folder: Path, *, on_lan: bool) -> AsyncIterator[tuple[dict[str, Node], Lan | None]]:
    """Six nodes of one mesh that all know each other; each on a machine of its own if possible."""
    async with AsyncExitStack() as stack:
        network = await stack.enter_async_context(lan(NODES)) if on_lan else None
        machines: Mapping[str, Machine] = network.machines if network else {}
        found = {
            name: Node(folder / name, name, _CONFIG[name], machines.get(name)) for name in NODES
        }
        for node in found.values():
            stack.push_async_callback(node.aclose)
        first, *others = found.values()
        await first.start()
        link = json.loads(await first.cli("invite", "--json"))["link"]
        async with trio.open_nursery() as nursery:
            for node in others:
                nursery.start_soon(_join, node, link)
        await all_meet(found)
        yield found, network


async def _join(node: Node, link: str) -> None:
    await node.cli("join", "-", stdin=link)
    await node.start()


async def all_meet(found: Mapping[str, Node]) -> None:
    """Until everyone is connected to everyone, and knows everyone's providers."""
    providers = {name for name, config in _CONFIG.items() if config}

    async def knows_all(node: Node) -> bool:
        peers = (await node.json("/mesh/v1/peers"))[1:]
        met = {p["node"] for p in peers if p["state"] == "connected"}
        offering = {p["node"] for p in peers if p["providers"]}
        return met == {*NODES} - {node.name} and offering == providers - {node.name}

    with trio.move_on_after(HEALED_IN):
        for node in found.values():
            while not await knows_all(node):  # noqa: ASYNC110 - another process has no events
                await trio.sleep(0.2)
        return
    tables = {
        node.name: [(p["node"], p["state"], p["reason"]) for p in await node.json("/mesh/v1/peers")]
        for node in found.values()
    }
    raise AssertionError(f"not all know each other after {HEALED_IN} s: {tables}")


# --- what clients see


@dataclass
class Outcome:
    """How a request went, as its client saw it."""

    question: Question
    kind: Literal["whole", "error", "left", "wrong"] = "wrong"
    #: The code of the error, or what is wrong.
    said: str = ""
    seconds: float = 0.0
    text: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        words = f"{self.question}: {self.kind} after {self.seconds:.1f} s: {self.said}"
        return f"{words}\n  {len(self.text)} characters; origin {dict(self.origin)}; {self.error}"


async def ask(node: Node, question: Question) -> Outcome:
    """Ask it, and judge what comes."""
    outcome = Outcome(question)
    body = {
        "model": "echo",
        "messages": [{"role": "user", "content": question.prompt}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "promptmesh": {"policy": question.policy, "deadline_s": DEADLINE},
    }
    started = trio.current_time()
    with trio.move_on_after(DEADLINE + SLACK) as limit:
        data = json.dumps(body | dict(question.fields)).encode()
        try:
            async with node.exchange("POST", "/v1/chat/completions", data) as reply:
                await _read(reply, outcome)
        except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError) as error:
            outcome.kind, outcome.said = "wrong", f"the connection was cut: {error!r}"
    outcome.seconds = trio.current_time() - started
    if limit.cancelled_caught:
        outcome.kind, outcome.said = "wrong", "it hung"
    return outcome


async def _read(reply: Reply, outcome: Outcome) -> None:
    if reply.status != 200:
        outcome.error = json.loads(await reply.rest())["error"]
        _judge_error(outcome)
        return
    ended, count = "", 0
    async for data in reply:
        count += 1
        if ended:
            outcome.said = f"more came after {ended}: {data!r}"
            return
        if data == b"[DONE]":
            ended = "[DONE]"
        elif "error" in (event := json.loads(data)):
            outcome.error, ended = event["error"], "the error"
        else:
            _take(outcome, event)
        if count == outcome.question.leaves_after:
            outcome.kind = "left"
            return
    if outcome.error is not None:
        _judge_error(outcome)
    elif ended:
        _judge_whole(outcome)
    else:
        outcome.said = "it ended with neither [DONE] nor an error"


def _take(outcome: Outcome, event: Mapping[str, Any]) -> None:
    outcome.origin = event.get("promptmesh") or outcome.origin
    outcome.usage = event.get("usage") or outcome.usage
    for choice in event["choices"]:
        outcome.text += choice["delta"].get("content") or ""
        outcome.finish_reason = choice["finish_reason"] or outcome.finish_reason


def _judge_error(outcome: Outcome) -> None:
    error, expected = outcome.error or {}, outcome.question.expected
    partial = error.get("partial", "")
    if not error.get("message") or not error.get("code"):
        outcome.said = "the error does not say what went wrong"
    elif not expected.startswith(outcome.text):
        outcome.said = f"the text before the error is not the answer's: {outcome.text!r}"
    elif partial != outcome.text:
        outcome.said = f"the error's partial text is not what came: {partial!r}"
    else:
        outcome.kind, outcome.said = "error", error["code"]


def _judge_whole(outcome: Outcome) -> None:
    question, origin, usage = outcome.question, outcome.origin, outcome.usage or {}
    if outcome.text != question.expected and not _ended_early(outcome):
        outcome.said = f"the text is {outcome.text!r}, not {question.expected!r}"
    elif outcome.finish_reason != question.finish_reason:
        outcome.said = f"it finished with {outcome.finish_reason!r}"
    elif not _counts(usage, len(question.expected.split())):
        outcome.said = f"its usage is {usage}"
    elif origin.get("cache") == "miss" and origin.get("policy") != question.policy:
        outcome.said = "another policy chose"
    elif not _says_who(origin):
        outcome.said = "it does not say who answered"
    else:
        outcome.kind, outcome.said = "whole", f"{origin['cache']}, {origin['attempts']} attempts"


def _ended_early(outcome: Outcome) -> bool:
    """Did an answer that changed hands reach its `max_tokens` a little early?

    How many of them the first node had used up is an estimate, and the usage says so.
    """
    usage, expected = outcome.usage or {}, outcome.question.expected
    return (
        bool(outcome.origin.get("begun_by") and usage.get("estimated"))
        and outcome.finish_reason == outcome.question.finish_reason == "length"
        and expected.startswith(outcome.text)
    )


def _counts(usage: Mapping[str, Any], tokens: int) -> bool:
    """Is it so many, or said to be an estimate, as where one node went on for another?"""
    counted: int = usage.get("completion_tokens", 0)
    return counted == tokens or (bool(usage.get("estimated")) and counted > 0)


def _says_who(origin: Mapping[str, Any]) -> bool:
    """Is it a node that could have answered so?"""
    node, cache, provider = (origin.get(name) for name in ("node", "cache", "provider"))
    computed = node in NODES and bool(_CONFIG[node]) and provider == "echo"
    if cache in ("hit-local", "hit-mesh", "coalesced"):
        return computed or (node in NODES and provider == "cache")
    return computed and cache == "miss"


def _is_rest(text: str, reason: str, whole: Iterable[tuple[str, str]]) -> bool:
    """Is it what a node gave that was asked to go on? It begins with the space before a word.

    That is an answer, too, to the question with the text before it. Where it is cut by its
    `max_tokens`, it may be so early (`_ended_early`).
    """
    return text.startswith(" ") and any(
        reason == its_reason and (text in its if reason == "length" else its.endswith(text))
        for its, its_reason in whole
    )


# --- both together


class Chaos:
    """Carries out a schedule while the questions are asked, and remembers what happened."""

    def __init__(self, found: Mapping[str, Node], network: Lan | None) -> None:
        self.nodes = found
        self.outcomes: list[Outcome] = []
        self.happened: list[str] = []
        self._network = network
        self._busy = {name: trio.Lock() for name in NODES}
        self._started = math.nan

    async def run(self, faults: Sequence[Sequence[Fault]], asked: Sequence[Question]) -> None:
        """All of it, until the last fault is over and the last question answered."""
        self._started = trio.current_time()
        async with trio.open_nursery() as nursery:
            for sequence in faults:
                nursery.start_soon(self._befall, sequence)
            for question in asked:
                nursery.start_soon(self._ask, question)

    async def _ask(self, question: Question) -> None:
        await trio.sleep_until(self._started + question.at)
        self.outcomes.append(await ask(self.nodes[question.node], question))

    async def _befall(self, sequence: Sequence[Fault]) -> None:
        for fault in sequence:
            await trio.sleep_until(self._started + fault.at)
            async with AsyncExitStack() as held:
                for name in fault.nodes:
                    await held.enter_async_context(self._busy[name])
                self._note(f"{fault.kind} {' '.join(fault.nodes)}")
                await self._carry_out(fault)
                self._note(f"over: {fault.kind} {' '.join(fault.nodes)}")

    async def _carry_out(self, fault: Fault) -> None:
        node = self.nodes[fault.nodes[0]]
        match fault.kind:
            case "kill":
                await node.kill()
                await trio.sleep(fault.lasts)
                await node.start()
            case "restart":
                assert await node.stop() == 0, f"{node.name} does not stop as it should"
                await trio.sleep(fault.lasts)
                await node.start()
            case "stop":
                node.signal(signal.SIGSTOP)
                await trio.sleep(fault.lasts)
                node.signal(signal.SIGCONT)
            case "cut" | "split":
                assert self._network is not None
                pull = self._network.cut if fault.kind == "cut" else self._network.split
                await pull(fault.nodes)
                await trio.sleep(fault.lasts)
                await self._network.join(fault.nodes)

    def _note(self, what: str) -> None:
        self.happened.append(f"{trio.current_time() - self._started:6.1f} s  {what}")

    # --- what must hold

    def count(self) -> Counter[str]:
        """How many requests ended how."""
        return Counter(o.kind if o.kind != "error" else f"error {o.said}" for o in self.outcomes)

    def wrong(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.kind == "wrong"]

    def unwell(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.kind != "whole"]

    async def note_what_they_hold(self) -> None:
        """Before anything goes wrong."""
        for node in self.nodes.values():
            node.files, node.memory = node.holds()

    async def check_nothing_leaks(self) -> None:
        """No work goes on, and descriptors and memory are what they were, nearly."""
        for node in self.nodes.values():

            async def idle(node: Node = node) -> bool:
                providers = await node.json("/mesh/v1/providers")
                busy = any(p["running"] or p["waiting"] for p in providers)
                return not busy and node.holds()[0] <= node.files + MORE_FILES

            await until(idle, f"{node.name} is idle: {node.files} -> {node.holds()}", IDLE_IN)
            memory = node.holds()[1]
            assert memory <= node.memory + MORE_MB, (node.name, node.memory, memory)

    async def check_stores(self, asked: Sequence[Question]) -> int:
        """Every stored answer is a whole one, or the rest of one. How many there are."""
        whole = {(q.expected, q.finish_reason) for q in asked}
        count = 0
        for node in self.nodes.values():
            for entry in await node.json("/mesh/v1/cache?limit=1000"):
                answer = await node.json(f"/mesh/v1/cache/{entry['cid']}/answer")
                given = answer["text"], answer["finish_reason"]
                assert given in whole or _is_rest(*given, whole), (node.name, answer)
                count += 1
        return count

    async def check_who_answered(self) -> None:
        """Who is said to have answered did. A node that was killed has forgotten how often."""
        for name in ASKERS:
            said = {
                outcome.question.prompt
                for outcome in self.outcomes
                if outcome.kind == "whole"
                and (outcome.origin["node"], outcome.origin["cache"]) == (name, "miss")
            }
            providers = await self.nodes[name].json("/mesh/v1/providers")
            finished = sum(provider["stats"]["finished"] for provider in providers)
            assert len(said) <= finished, f"{name} finished {finished}, not {len(said)}"

    def check_logs(self) -> None:
        """Nothing came as a surprise to a node."""
        for node in self.nodes.values():
            log = node.log.read_text()
            assert "Traceback" not in log, f"{node.log}: {log[log.index('Traceback') :][:4000]}"

    def story(self) -> str:
        """What is needed to understand a failure."""
        logs = [
            f"--- {node.log}\n" + "\n".join(node.log.read_text().splitlines()[-30:])
            for node in self.nodes.values()
        ]
        bad = [str(outcome) for outcome in self.wrong()]
        return "\n".join([*self.happened, *bad, str(dict(self.count())), *logs])
