from typing import Any

import cbrrr
import libipld
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.cache.car import MAX_HEADER, CarError, Limits, header, read, section, write
from promptmesh.cache.cid import PREFIX, cid_bytes, verify
from promptmesh.cache.links import version_0

BLOCKS = [
    (cid_bytes(block, codec), block)
    for codec in PREFIX
    for block in (b"", b"one", b"\xa0", bytes(200), bytes(20_000))
]
ROOT = BLOCKS[0][0]
CAR = write([ROOT], BLOCKS)
#: Of `write([], [])`: {"roots": [], "version": 1}
EMPTY = bytes.fromhex("11a265726f6f7473806776657273696f6e01")


def test_the_bytes_of_the_specification() -> None:
    assert write([], []) == EMPTY
    cid = cid_bytes(b"hi", "raw")
    assert section(cid, b"hi") == b"\x26" + cid + b"hi"
    assert section(cid, bytes(300))[:2] == b"\xd0\x02"


def test_comes_back_whole() -> None:
    car = read(CAR)
    assert car.roots == (ROOT,)
    assert list(car.blocks.items()) == BLOCKS
    assert read(EMPTY).roots == ()


def test_another_reader_reads_the_same() -> None:
    cbor = [(cid_bytes(block), block) for block in (b"\xa0", cbrrr.encode_dag_cbor({"a": "b"}))]
    head, blocks = libipld.decode_car(write([cbor[1][0]], cbor))
    assert head == {"roots": [cbor[1][0]], "version": 1}
    assert blocks == {cbor[0][0]: {}, cbor[1][0]: {"a": "b"}}


def test_a_block_twice_is_one() -> None:
    again = CAR + section(*BLOCKS[1])
    assert read(again) == read(CAR)


def test_a_section_at_a_time_is_the_same_file() -> None:
    assert header([ROOT]) + b"".join(section(*block) for block in BLOCKS) == CAR


# --- what a stranger may send ---------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 30, len(header([ROOT])) + 1, len(CAR) - 1])
def test_a_cut_file(cut: int) -> None:
    with pytest.raises(CarError, match=r"the file ends within|not a varint: cut"):
        read(CAR[:cut])


def test_the_end_of_a_block_may_be_the_end() -> None:
    assert read(CAR[: len(header([ROOT]))]).blocks == {}


@pytest.mark.parametrize("wrong", range(0, len(CAR), 997))
def test_a_changed_byte(wrong: int) -> None:
    changed = bytearray(CAR)
    changed[wrong] ^= 1
    with pytest.raises(CarError):
        read(bytes(changed))


def test_a_block_that_is_not_its_cid() -> None:
    with pytest.raises(CarError, match="block 2 is not what its CID names, bafkrei"):
        read(write([], [BLOCKS[1], (BLOCKS[1][0], b"two")]))


@pytest.mark.parametrize(
    "cid",
    [
        b"",
        b"\x01\x55",
        b"\x12\x20" + bytes(31),  # a cut one of version 0
        b"\x01\x71\x13\x40" + bytes(64),  # sha2-512
        b"\x01\x55\x00\x03abc",  # identity
        ROOT[:-1],
    ],
)
def test_a_cid_that_we_do_not_use(cid: bytes) -> None:
    with pytest.raises(CarError, match="block 1 has no CID"):
        read(write([], [(cid, b"")]))


def test_cids_of_version_0() -> None:
    block = b"a node of a file"
    cid = cid_bytes(block, "dag-pb")
    found = read(write([version_0(cid)], [(version_0(cid), block)]))
    assert (found.roots, found.blocks) == ((version_0(cid),), {cid: block})


def _headed(plain: Any) -> bytes:
    return headed(cbrrr.encode_dag_cbor(plain))


def headed(plain: bytes) -> bytes:
    return bytes([len(plain)]) + plain


@pytest.mark.parametrize(
    "data",
    [
        headed(b""),
        headed(b"\xff"),
        headed(b"\x81" * 120),
        headed(EMPTY[1:] + b"\x00"),
        headed(b"\xa2\x67version\x01\x65roots\x80"),  # keys out of order
        _headed({"version": 2}),
        _headed({"version": 1}),
        _headed({"version": 2, "roots": []}),
        _headed({"version": True, "roots": []}),
        _headed({"version": 1, "roots": None}),
        _headed({"version": 1, "roots": [b"x"]}),
        _headed({"version": 1, "roots": [cbrrr.CID(b"\x12\x20" + bytes(31))]}),
        _headed({"version": 1, "roots": [], "more": 1}),
        _headed([1]),
    ],
)
def test_another_header(data: bytes) -> None:
    with pytest.raises(CarError, match="not the header"):
        read(data)


def test_version_2_is_named() -> None:
    # What every CARv2 begins with.
    with pytest.raises(CarError, match=r"version 1.*2"):
        read(bytes.fromhex("0aa16776657273696f6e02") + bytes(40))


@pytest.mark.parametrize(
    ("length", "why"),
    [
        (b"\x80\x80\x80\x80\x80\x01", "is the most"),
        (b"\xff" * 9, "the length of block 1: not a varint"),
        (b"\xff" * 10, "the length of block 1: not a varint"),
        (b"\xa6\x00", "the length of block 1: not a varint"),
        (b"\x80\x80\x00", "the length of block 1: not a varint"),
        (b"\xff\xff\xff\xff\x7f", "is the most"),
        (b"\xff\xff\xff\x7f", "is the most"),
        (b"\x80", "the length of block 1: not a varint"),
        (b"\x00", "has no CID"),
    ],
)
def test_lengths(length: bytes, why: str) -> None:
    with pytest.raises(CarError, match=why):
        read(EMPTY + length)


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        (Limits(blocks=len(BLOCKS) - 1), f"more than {len(BLOCKS) - 1} blocks"),
        (Limits(block_bytes=19_900), "block 5 has 20036 bytes"),
        (Limits(bytes=len(CAR) - 1), f"{len(CAR)} bytes"),
    ],
)
def test_limits(limits: Limits, why: str) -> None:
    with pytest.raises(CarError, match=why):
        read(CAR, limits)
    exact = Limits(blocks=len(BLOCKS), block_bytes=20_000, bytes=len(CAR))
    assert read(CAR, exact) == read(CAR)


def test_the_same_small_block_again_and_again_counts() -> None:
    with pytest.raises(CarError, match="more than 4096 blocks"):
        read(EMPTY + section(*BLOCKS[0]) * 4097)


def test_a_long_header() -> None:
    with pytest.raises(CarError, match=f"{MAX_HEADER} is the most"):
        read(write([ROOT] * 200, []))
    with pytest.raises(CarError, match="not the header"):
        read(write([ROOT] * 65, []))


@given(
    st.lists(st.tuples(st.sampled_from(sorted(PREFIX)), st.binary(max_size=400)), max_size=6),
    st.integers(0, 3),
)
def test_whatever_is_written_is_read(content: list[tuple[Any, bytes]], roots: int) -> None:
    blocks = [(cid_bytes(block, codec), block) for codec, block in content]
    named = [cid for cid, _ in blocks[:roots]]
    car = read(write(named, blocks))
    assert (list(car.roots), car.blocks) == (named, dict(blocks))


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(lambda data: EMPTY + data)))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    check(data)


@given(st.integers(0, len(CAR)), st.integers(0, len(CAR) - 1), st.integers(1, 255))
def test_of_a_damaged_file_only_sound_blocks_are_read(end: int, at: int, change: int) -> None:
    damaged = bytearray(CAR)
    damaged[at] ^= change
    for data in (CAR[:end], bytes(damaged), bytes(damaged)[:end]):
        check(data)


def check(data: bytes) -> None:
    try:
        car = read(data)
    except CarError:
        return
    assert data.startswith(header(car.roots))
    assert all(verify(cid, block) for cid, block in car.blocks.items())
    assert sum(map(len, car.blocks.values())) <= len(data)
