"""The cables of the tests' own network: pulled, they lose packets without a word."""

import pytest
import trio
from lan import Lan, lan, why_no_lan

pytestmark = pytest.mark.skipif(
    bool(why_no_lan()), reason=f"no network namespaces here: {why_no_lan()}"
)

PORT = 7412
#: Seconds in which a packet would have come, and in which it must have come.
SOON, AT_LAST = 0.5, 30.0


async def connected(net: Lan, server: str, client: str) -> tuple[trio.SocketStream, ...]:
    """The two ends of a connection between these machines."""
    async with await net.machines[server].listen(PORT) as listener:
        asking = await net.machines[client].connect(net.machines[server].address, PORT)
        return await listener.accept(), asking


async def silent(stream: trio.SocketStream) -> bool:
    with trio.move_on_after(SOON):
        await stream.receive_some()
        return False
    return True


async def test_a_cut_machine_hears_nothing_until_its_cable_is_back() -> None:
    async with lan("ab") as net:
        at_a, at_b = await connected(net, "a", "b")
        async with at_a, at_b:
            await net.cut("b")
            await at_b.send_all(b"hello")
            assert await silent(at_a)
            await net.join("b")
            with trio.fail_after(AT_LAST):
                assert await at_a.receive_some() == b"hello"


async def test_machines_that_are_split_off_reach_one_another_only() -> None:
    async with lan("abc") as net:
        a_to_b, b_to_a = await connected(net, "a", "b")
        a_to_c, c_to_a = await connected(net, "a", "c")
        async with a_to_b, b_to_a, a_to_c, c_to_a:
            await net.split("ab")
            await a_to_b.send_all(b"near")
            await a_to_c.send_all(b"far")
            with trio.fail_after(AT_LAST):
                assert await b_to_a.receive_some() == b"near"
            assert await silent(c_to_a)
            await net.join("ab")
            with trio.fail_after(AT_LAST):
                assert await c_to_a.receive_some() == b"far"
