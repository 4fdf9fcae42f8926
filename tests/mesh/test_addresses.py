"""Addresses of TCP and of circuits."""

import pytest

from promptmesh.mesh.addresses import (
    Circuit,
    Place,
    directly_first,
    is_circuit,
    parse,
    parse_circuit,
    reachable,
)

R, P = "12D3KooWRelay", "12D3KooWPeer"
AT_R = f"/ip4/203.0.113.1/tcp/7412/p2p/{R}"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (f"{AT_R}/p2p-circuit/p2p/{P}", Circuit(R, AT_R, P)),
        (f"{AT_R}/p2p-circuit", Circuit(R, AT_R, None)),
        (f"/p2p/{R}/p2p-circuit/p2p/{P}", Circuit(R, "", P)),
    ],
)
def test_circuits(address: str, expected: Circuit) -> None:
    assert is_circuit(address)
    assert parse_circuit(address) == expected
    with pytest.raises(ValueError, match="not a TCP address"):
        parse(address)


@pytest.mark.parametrize(
    "address",
    [
        "/p2p-circuit",
        f"/ip4/203.0.113.1/tcp/7412/p2p-circuit/p2p/{P}",
        f"/ip4/203.0.113.1/udp/7412/quic-v1/p2p/{R}/p2p-circuit/p2p/{P}",
        f"{AT_R}/p2p-circuit/p2p/{P}/p2p-circuit/p2p/x",
        f"{AT_R}/p2p-circuit/ip4/1.2.3.4",
        f"{AT_R}/p2p/x/p2p-circuit",
    ],
)
def test_what_is_no_circuit(address: str) -> None:
    with pytest.raises(ValueError, match=r"circuit|address"):
        parse_circuit(address)


def test_a_place() -> None:
    assert parse(AT_R) == Place("203.0.113.1", 7412, R)


def test_relays_are_tried_last() -> None:
    circuit = f"{AT_R}/p2p-circuit/p2p/{P}"
    assert directly_first([circuit, "/ip4/1.1.1.1/tcp/1", "/ip4/2.2.2.2/tcp/2"]) == [
        "/ip4/1.1.1.1/tcp/1",
        "/ip4/2.2.2.2/tcp/2",
        circuit,
    ]


@pytest.mark.parametrize(
    ("bound", "machine", "expected"),
    [
        (("0.0.0.0", 1), ["127.0.0.1", "10.0.0.7", "::1"], ["/ip4/10.0.0.7/tcp/1"]),
        (("0.0.0.0", 1), ["127.0.0.1", "169.254.3.4", "::1"], ["/ip4/127.0.0.1/tcp/1"]),
        (("127.0.0.1", 1), ["127.0.0.1", "10.0.0.7"], ["/ip4/127.0.0.1/tcp/1"]),
        (("10.0.0.7", 1), ["127.0.0.1", "10.0.0.7", "10.0.0.8"], ["/ip4/10.0.0.7/tcp/1"]),
        (("::", 1), ["10.0.0.7", "::1", "fe80::1", "2001:db8::5"], ["/ip6/2001:db8::5/tcp/1"]),
        (("::", 1), ["10.0.0.7", "::1"], ["/ip6/::1/tcp/1"]),
    ],
)
def test_addresses_are_those_that_others_can_dial(
    bound: tuple[str, int], machine: list[str], expected: list[str]
) -> None:
    assert reachable([bound, bound], machine) == expected


@pytest.mark.parametrize(
    "address",
    [
        "",
        "nonsense",
        "/ip4/127.0.0.1",
        "/ip4/127.0.0.1/udp/7412/quic-v1",
        "/ip4/127.0.0.1/tcp/7412/ws",
        "/ip4/127.0.0.1/tcp/http",
        "/ip4/127.0.0.1/tcp/65536",
        "/ip4//tcp/1",
        "/unix/127.0.0.1/tcp/1",
        "/ip4/127.0.0.1/tcp/1/p2p-circuit/x",
    ],
)
def test_only_tcp_addresses_are_dialled(address: str) -> None:
    with pytest.raises(ValueError, match=r"address|port"):
        parse(address)
