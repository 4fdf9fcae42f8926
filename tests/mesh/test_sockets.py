"""Connections that leave from one port."""

import pytest
import trio

from promptmesh.mesh.sockets import connect, is_ip


async def test_a_port_that_one_connection_leaves_from_can_be_anothers() -> None:
    near, far = [(await trio.open_tcp_listeners(0, host="127.0.0.1"))[0] for _ in range(2)]
    async with near, far:
        one = await connect("127.0.0.1", near.socket.getsockname()[1])
        local = one.socket.getsockname()
        async with one, await connect(*far.socket.getsockname(), local=local) as other:
            assert other.socket.getsockname() == local
            async with await far.accept() as met:
                assert met.socket.getpeername() == local


async def test_a_name_is_connected_to() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, await connect("localhost", listener.socket.getsockname()[1]) as made:
        assert made.socket.getpeername() == listener.socket.getsockname()


async def test_nobody_there() -> None:
    with pytest.raises(OSError, match="refused"):
        await connect("127.0.0.1", 1)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("10.0.0.1", True), ("fe80::1%eth0", True), ("localhost", False), ("", False)],
)
def test_addresses_are_told_from_names(host: str, expected: bool) -> None:
    assert is_ip(host) == expected
