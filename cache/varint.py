"""Unsigned varints, as in CIDs, protobuf and CAR files: seven bits a byte, the lowest first."""

from __future__ import annotations

#: The largest number has 64 bits.
_MAX_BYTES = 10


def encode(number: int) -> bytes:
    """The varint of a number that is not negative."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))


def decode(data: bytes, at: int) -> tuple[int, int]:
    """The number at that place, and the place behind it.

    Raises `ValueError` where the data end, for more than 64 bits, and for one that is written
    longer than it needs.
    """
    number = 0
    for place, byte in enumerate(data[at : at + _MAX_BYTES]):
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            if number >> 64 or (place and not byte):
                break
            return number, at + place + 1
    raise ValueError("not a varint: cut, too long, or not its shortest form")
