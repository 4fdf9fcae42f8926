"""In a large mesh claims are at the homes of their keys: put there, found there, kept there."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from fakes_sharing import SWARM, Member, Network, asking, find, now

from promptmesh.cache.claims import unseal
from promptmesh.cache.homes import COUNT, MAX_GOSSIPED, SETTLED, homes
from promptmesh.cache.keys import mesh_key, namespace_secret, request_key
from promptmesh.node.finding import HOME_TIME, MISS_TIME

#: A test names the clock itself: it works only for who does.
Clock = trio.testing.MockClock


class Mesh:
    """Members that come and go."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.members: dict[str, Member] = {}
        self.networks: dict[str, Network] = {}
        self._scopes: dict[str, trio.CancelScope] = {}
        self._left: list[Member] = []

    def join(self, name: str) -> Member:
        member = Member(name)
        self._start(member)
        return member

    def restart(self, member: Member) -> None:
        """As if its process ended and began."""
        self._scopes[member.peer].cancel()
        member.start()
        self._start(member)

    def _start(self, member: Member) -> None:
        self.members[member.peer] = member
        self.networks[member.peer] = Network(member, self.members)
        member.sharing.attach(self.networks[member.peer], SWARM)
        self._scopes[member.peer] = trio.CancelScope()
        self._nursery.start_soon(self._run, member)

    def leave(self, peer: str) -> None:
        self._left.append(self.members.pop(peer))
        self._scopes[peer].cancel()

    async def _run(self, member: Member) -> None:
        with self._scopes[member.peer]:
            await member.sharing.run()

    def holders(self, prompt: str) -> set[str]:
        """Who has a claim to that."""
        return {peer for peer, member in self.members.items() if member.claims(asking(prompt))}

    def homes_of(self, prompt: str, publisher: Member) -> set[str]:
        key = mesh_key(namespace_secret(SWARM), request_key(asking(prompt)))
        return set(homes(key, self.members.keys() - {publisher.peer}))

    def stranger(self, prompt: str, *but: Member) -> Member:
        """A member that has no claim to that."""
        known = self.holders(prompt)
        return next(m for p, m in self.members.items() if p not in known and m not in but)

    def network(self, member: Member) -> Network:
        return self.networks[member.peer]

    def close(self) -> None:
        for member in [*self.members.values(), *self._left]:
            member.database.close()


@asynccontextmanager
async def large_mesh(size: int = 80) -> AsyncIterator[Mesh]:
    async with trio.open_nursery() as nursery:
        mesh = Mesh(nursery)
        for number in range(size):
            mesh.join(f"member {number}")
        await trio.sleep(15)  # until all have seen how many they are
        yield mesh
        nursery.cancel_scope.cancel()
    mesh.close()


async def test_a_claim_is_at_its_homes_and_found_there(autojump_clock: Clock) -> None:
    async with large_mesh() as mesh:
        producer = next(iter(mesh.members.values()))
        for number in range(20):
            await producer.make(asking(str(number)), f"answer {number}")
        await trio.sleep(60)
        assert mesh.network(producer).gossiped == []
        for number in range(20):
            assert mesh.holders(str(number)) == mesh.homes_of(str(number), producer)
        for number in range(20):
            asker = mesh.stranger(str(number), producer)
            asked = mesh.network(asker).asked_homes
            asked.clear()
            started = trio.current_time()
            assert await find(asker, asking(str(number))) == (f"answer {number}", producer.peer)
            assert trio.current_time() - started <= HOME_TIME
            assert len(asked) <= COUNT
        # Each home got only what it is a home of.
        for home, envelope in mesh.network(producer).put:
            for entry in unseal(envelope).batch.entries:
                assert home in homes(entry.key, mesh.members.keys() - {producer.peer})


async def test_what_is_new_comes_in_one_batch_for_a_home(autojump_clock: Clock) -> None:
    async with large_mesh(MAX_GOSSIPED + 1) as mesh:
        producer = next(iter(mesh.members.values()))
        for number in range(200):
            await producer.make(asking(str(number)), f"answer {number}")
        await trio.sleep(60)
        put = mesh.network(producer).put
        claims = sum(len(unseal(envelope).batch.entries) for _, envelope in put)
        assert claims == 200 * COUNT
        assert len(put) <= 80  # nearly one for each home


async def test_a_home_that_is_gone_or_slow_costs_no_hit(autojump_clock: Clock) -> None:
    async with large_mesh() as mesh:
        producer = next(iter(mesh.members.values()))
        await producer.make(asking(), "hello")
        await trio.sleep(10)
        first, second, third = mesh.homes_of("hi", producer)
        asker = mesh.stranger("hi", producer)
        mesh.network(asker).gone.add(first)
        mesh.network(asker).gone.add(second)
        assert await find(asker, asking()) == ("hello", producer.peer)
        asker = mesh.stranger("hi", producer)
        mesh.network(asker).faults[third] = "never"
        assert await find(asker, asking()) == ("hello", producer.peer)


async def test_a_miss_is_short_and_remembered(autojump_clock: Clock) -> None:
    async with large_mesh() as mesh:
        asker = next(iter(mesh.members.values()))
        network = mesh.network(asker)
        for peer in mesh.members:
            network.faults[peer] = "never"
        started = trio.current_time()
        assert await find(asker, asking()) is None
        assert trio.current_time() - started == pytest.approx(HOME_TIME)
        asked = len(network.asked_homes)
        assert asked == 2
        assert await find(asker, asking()) is None
        assert len(network.asked_homes) == asked
        assert trio.current_time() - started == pytest.approx(HOME_TIME)
        network.faults.clear()
        await trio.sleep(MISS_TIME)
        assert await find(asker, asking()) is None
        assert len(network.asked_homes) == asked + COUNT


async def test_only_so_many_lookups_ask_homes_at_once(autojump_clock: Clock) -> None:
    async with large_mesh() as mesh:
        asker = next(iter(mesh.members.values()))
        for peer in mesh.members:
            mesh.network(asker).faults[peer] = "never"
        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(500):
                nursery.start_soon(find, asker, asking(str(number)))
        assert trio.current_time() - started == pytest.approx(HOME_TIME)
        assert len(mesh.network(asker).asked_homes) == 2 * 16


async def test_what_a_home_gives_is_checked_like_anything(autojump_clock: Clock) -> None:
    async with large_mesh() as mesh:
        producer = next(iter(mesh.members.values()))
        await producer.make(asking(), "hello")
        await trio.sleep(10)
        for peer in mesh.homes_of("hi", producer):
            # One changed byte of the signature.
            mesh.members[peer].database.rows(
                "UPDATE batch SET envelope = substr(envelope, 1, length(envelope) - 1) || x'00'"
            )
        asker = mesh.stranger("hi", producer)
        assert await find(asker, asking()) is None
        assert asker.claims(asking()) == []


async def test_as_members_come_and_go_claims_follow(autojump_clock: Clock) -> None:
    async with large_mesh() as mesh:
        producer = next(iter(mesh.members.values()))
        prompts = [str(number) for number in range(40)]
        for prompt in prompts:
            await producer.make(asking(prompt), f"answer {prompt}")
        await trio.sleep(90)
        before = len(mesh.network(producer).put)
        for number in range(80, 84):
            mesh.join(f"member {number}")
        for peer in list(mesh.members)[1:5]:
            mesh.leave(peer)
        await trio.sleep(60)
        for prompt in prompts:
            assert mesh.holders(prompt) >= mesh.homes_of(prompt, producer)
        # Of 120 places about 6 moved by joins and as many by leaves.
        moved = [
            e
            for _, envelope in mesh.network(producer).put[before:]
            for e in unseal(envelope).batch.entries
        ]
        assert 0 < len(moved) < 30
        for prompt in prompts:
            asker = mesh.stranger(prompt, producer)
            assert await find(asker, asking(prompt)) is not None


async def test_all_homes_of_a_claim_may_leave(autojump_clock: Clock) -> None:
    async with large_mesh() as mesh:
        producer = next(iter(mesh.members.values()))
        await producer.make(asking(), "hello")
        await trio.sleep(10)
        for peer in mesh.homes_of("hi", producer):
            mesh.leave(peer)
        await trio.sleep(10)
        assert await find(mesh.stranger("hi", producer), asking()) == ("hello", producer.peer)


async def test_a_home_that_was_not_reached_is_told_later(autojump_clock: Clock) -> None:
    async with large_mesh() as mesh:
        producer = next(iter(mesh.members.values()))
        mesh.network(producer).gone |= mesh.homes_of("hi", producer)
        await producer.make(asking(), "hello")
        await trio.sleep(20)
        assert mesh.holders("hi") == set()
        mesh.network(producer).gone.clear()
        await trio.sleep(40)
        assert mesh.holders("hi") == mesh.homes_of("hi", producer)


async def test_a_mesh_that_grows_and_shrinks_loses_nothing(autojump_clock: Clock) -> None:
    async with large_mesh(MAX_GOSSIPED) as mesh:
        members = list(mesh.members.values())
        await members[0].make(asking("small"), "gossiped")
        await trio.sleep(60)
        assert len(mesh.holders("small")) == MAX_GOSSIPED - 1

        late = [mesh.join(f"late {number}") for number in range(30)]
        await trio.sleep(30)
        await members[1].make(asking("large"), "at homes")
        for number in range(100):
            await members[2].make(asking(f"large {number}"), f"at homes {number}")
        await trio.sleep(60)
        assert len(mesh.holders("large")) == COUNT
        # Who joined since is told too, where it is a home of what was gossiped before.
        assert mesh.holders("small") >= mesh.homes_of("small", members[0])
        assert await find(late[0], asking("small")) == ("gossiped", members[0].peer)

        for member in [*late, *members[40:]]:
            mesh.leave(member.peer)
        await trio.sleep(SETTLED + 120)
        prompts = ["small", "large", *(f"large {number}" for number in range(100))]
        for prompt in prompts:
            assert len(mesh.holders(prompt)) == 39, prompt
        # All in two batches of a new epoch.
        assert members[2].index.versions(now())[members[2].peer].numbers == ((1, 2),)
        put = Counter(mesh.network(members[2]).put)
        await members[1].make(asking("small again"), "gossiped again")
        await trio.sleep(60)
        assert len(mesh.holders("small again")) == 39
        assert Counter(mesh.network(members[2]).put) == put


async def test_the_claims_of_a_node_that_starts_again_are_placed(autojump_clock: Clock) -> None:
    async with large_mesh() as mesh:
        producer = next(iter(mesh.members.values()))
        await producer.make(asking(), "hello")
        await trio.sleep(10)
        assert await find(mesh.stranger("hi", producer), asking()) is not None
        homes_before = mesh.homes_of("hi", producer)
        for peer in homes_before:
            mesh.members[peer].index.forget(producer.peer)
        mesh.restart(producer)
        await trio.sleep(60)
        assert mesh.holders("hi") >= homes_before
