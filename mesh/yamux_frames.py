"""The frames of yamux: a head of 12 bytes, and in those that carry data so many bytes after it.

https://github.com/hashicorp/yamux/blob/master/spec.md
"""

from __future__ import annotations

import struct

PROTOCOL_ID = "/yamux/1.0.0"

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
HEADER = struct.Struct("!BBHII")  # version, type, flags, stream, length
#: Payload of a frame: with its header it fits one noise message.
MAX_PAYLOAD = 65519 - HEADER.size


class YamuxViolation(Exception):
    """The peer broke the protocol: the connection must end."""
