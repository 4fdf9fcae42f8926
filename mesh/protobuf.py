"""The bytes of protobuf messages, as far as the protocols of libp2p need them. Pure.

The protobuf library builds each of the elements that fit into a message before anything can count
them. Here a count is held first.

https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator

from .frames import RemoteProtocolError

# --- writing --------------------------------------------------------------------------------------


def bytes_field(number: int, data: bytes) -> bytes:
    """A field of bytes, or of a message within."""
    return bytes((number << 3 | 2,)) + varint(len(data)) + data


def varint(value: int) -> bytes:
    """A number in groups of seven bits, the lowest first."""
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    written.append(value)
    return bytes(written)


def number_field(number: int, value: int) -> bytes:
    """A field with a number that is not negative."""
    return bytes((number << 3,)) + varint(value)


# --- reading --------------------------------------------------------------------------------------


def fields_of(data: bytes, most: int) -> tuple[dict[int, int], dict[int, bytes]]:
    """The numbers and the byte strings of a small protobuf, the last of each field.

    Raises `RemoteProtocolError`, also for more than `most` fields.
    """
    numbers: dict[int, int] = {}
    strings: dict[int, bytes] = {}
    for number, value in read_fields(data, most):
        if isinstance(value, int):
            numbers[number] = value
        else:
            strings[number] = value
    return numbers, strings


def read_fields(data: bytes, most: int) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf, at most so many. Raises `RemoteProtocolError`."""
    position = 0
    while position < len(data):
        if not most:
            raise RemoteProtocolError("a message of too many elements")
        most -= 1
        tag, position = read_varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, position = read_varint(data, position)
            yield number, value
            continue
        if kind == 2:
            length, position = read_varint(data, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise RemoteProtocolError(f"a protobuf field of type {kind}")
        end = position + length
        if end > len(data):
            raise RemoteProtocolError("a protobuf that is cut")
        if kind == 2:
            yield number, data[position:end]
        position = end


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """A varint and the place after it. Raises `RemoteProtocolError`."""
    value = 0
    for shift, byte in enumerate(data[position : position + 10]):
        value |= (byte & 127) << 7 * shift
        if byte < 128:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position + shift + 1
    raise RemoteProtocolError("a protobuf with a number that is cut")
