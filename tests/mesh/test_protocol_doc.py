"""docs/protocol.md says what is: its bytes, frames, order, limits and errors are compared here.

The bytes are those of one exchange with fixed values. They are made again by the real encoder, and
taken apart byte by byte by the real `Exchange`.
"""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import cbrrr
import msgspec
import pytest
from doc_blocks import blocks, tables
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11 as MESHSUB
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE

from promptmesh.cache.cid import cid_text
from promptmesh.cache.claims import DOMAIN, Batch, Entry, seal, unseal
from promptmesh.cache.keys import mesh_key, namespace_secret, namespace_tag, request_key
from promptmesh.cache.records import AnswerRecord, encode
from promptmesh.mesh import adverts, gossip, mdns, protocol, reachability, relay_messages
from promptmesh.mesh.frames import Done, Frame, Generate, Head, Load, Piece, Reply, Request
from promptmesh.mesh.identity import Identity, verify
from promptmesh.mesh.protocol import TRANSITIONS, Asker, Server, State
from promptmesh.mesh.yamux_frames import PROTOCOL_ID as YAMUX
from promptmesh.node import join_link
from promptmesh.providers.base import (
    ERRORS,
    Chunk,
    Completion,
    Embedding,
    EmbedRequest,
    GenerateRequest,
    Message,
    ModelRequest,
    Origin,
    Sampling,
    Text,
    Usage,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
TEXT = DOCUMENT.read_text()

# --- the exchange of the document -----------------------------------------------------------------

#: The peer that answers, and the secret of its mesh: bytes 0 to 31, and 32 zero bytes.
PEER = Identity(bytes(range(32)))
SWARM_KEY = bytes(32)
MADE_AT = 1795461567
REQUEST = GenerateRequest(
    model="smol",
    messages=(Message(role="user", content=(Text(text="Say hello."),)),),
    sampling=Sampling(temperature=0.0, max_tokens=16),
    dialect="openai",
    deadline=600.0,
    id="req-1",
)
COMPLETION = Completion(
    text="Hello!", finish_reason="stop", usage=Usage(prompt_tokens=33, completion_tokens=3)
)
RECORD = encode(AnswerRecord(model="smol", completion=COMPLETION))
CID_TEXT = cid_text(RECORD.cid)


def the_claim() -> bytes:
    """The envelope that the peer signs for its answer."""
    secret = namespace_secret(SWARM_KEY)
    key = mesh_key(secret, request_key(REQUEST))
    entry = Entry(key, RECORD.cid, RECORD.size, MADE_AT, MADE_AT + 604_800, False)
    batch = Batch(namespace=namespace_tag(secret), epoch=MADE_AT * 1000, number=1, entries=(entry,))
    return seal(batch, peer=PEER.peer_id, sign=PEER.sign)


GENERATE = Generate(request=REQUEST)
REPLY: list[Frame] = [
    Head(
        origin=Origin(
            peer=PEER.peer_id, node="alpha", provider="local_hf", model="smol", attempts=1
        )
    ),
    Piece(chunk=Chunk(text="Hello")),
    Piece(chunk=Chunk(text="!")),
    Done(
        chunk=Chunk(finish_reason="stop", usage=COMPLETION.usage, cid=CID_TEXT),
        loads={"local_hf": Load(slots=16)},
        claim=the_claim(),
    ),
]


# --- the bytes ------------------------------------------------------------------------------------


def hex_lines(block: str) -> Iterator[tuple[bytes, str]]:
    """The bytes of each line and the words beside them."""
    for line in block.splitlines():
        digits, _, words = line.partition("#")
        yield bytes.fromhex(digits), words.strip()


def document_bytes() -> list[bytes]:
    """The frames of the document."""
    return [b"".join(data for data, _ in hex_lines(block)) for block in blocks(TEXT, "hex")]


def test_the_bytes_are_those_of_the_encoder() -> None:
    server, asker = Server(), Asker()
    made = [asker.send(GENERATE)]
    server.receive(made[0])
    made += [server.send(frame) for frame in REPLY]
    assert [data.hex() for data in document_bytes()] == [data.hex() for data in made]


def test_the_bytes_are_taken_apart_byte_by_byte() -> None:
    request, *reply = document_bytes()
    server, asker = Server(), Asker()
    asked = [frame for byte in request for frame in server.receive(bytes([byte]))]
    assert asked == [GENERATE]
    asker.send(asked[0])
    assert asker.state is State.AWAIT_HEAD
    received = [frame for byte in b"".join(reply) for frame in asker.receive(bytes([byte]))]
    assert received == REPLY
    assert asker.idle


def test_what_stands_beside_the_bytes_is_in_them() -> None:
    """Each quoted text of a line, as UTF-8; each number that is a field's value."""
    seen = 0
    for block in blocks(TEXT, "hex"):
        for data, words in hex_lines(block):
            for quoted in re.findall(r'"([^"]*)"', words):
                assert quoted.encode() in data, words
            field = re.fullmatch(r'"(\w+)": ([\d.]+)', words)
            if field:
                number = json.loads(field[2])
                forms = {msgspec.msgpack.encode(number), cbrrr.encode_dag_cbor(number)}
                assert data.rpartition(field[1].encode())[2] in forms, words
                seen += 1
    assert seen > 5


def test_the_answer_and_its_claim_belong_together() -> None:
    done = REPLY[-1]
    assert isinstance(done, Done)
    assert done.claim
    claim = unseal(done.claim)
    assert claim.peer == PEER.peer_id
    assert claim.signed(verify)
    (entry,) = claim.batch.entries
    assert entry.cid == RECORD.cid
    assert RECORD.blocks[0][0] == RECORD.cid
    assert f"`{CID_TEXT}`" in TEXT
    assert f"`{PEER.peer_id}`" in TEXT


# --- the tables -----------------------------------------------------------------------------------


def test_the_table_of_frames() -> None:
    def row(frame: type[Frame], sender: str) -> tuple[str, str, tuple[str, ...]]:
        return str(frame.__struct_config__.tag), sender, frame.__struct_fields__

    real = {row(frame, "asker") for frame in get_args(Request)}
    real |= {row(frame, "answerer") for frame in get_args(Reply)}
    told = {
        (kind, sender, tuple(re.findall(r"\w+", fields)))
        for kind, sender, fields, _ in tables(TEXT)["kind"]
    }
    assert told == real


def test_the_table_of_transitions() -> None:
    def kind(frame: type[Frame]) -> str:
        return str(frame.__struct_config__.tag)

    def sender(frame: type[Frame]) -> str:
        return "asker" if frame in get_args(Request) else "answerer"

    real = {
        (before.name, sender(frame), kind(frame), after.name)
        for (before, frame), after in TRANSITIONS.items()
    }
    assert set(tables(TEXT)["state"]) == real


def test_the_table_of_limits() -> None:
    rows = tables(TEXT)["limit"]
    for place, value, _ in rows:
        module, _, name = place.rpartition(".")
        found = getattr(importlib.import_module(f"promptmesh.{module}"), name)
        assert float(value.replace(" ", "")) == found, place
    assert len(rows) > 20


def test_the_table_of_errors() -> None:
    assert {code for code, _ in tables(TEXT)["code"]} == set(ERRORS)


def more_fields(request: type[ModelRequest]) -> tuple[str, ...]:
    """Those that not every request has."""
    return request.__struct_fields__[len(ModelRequest.__struct_fields__) :]


@pytest.mark.parametrize(
    ("what", "fields"),
    [
        ("a request", ModelRequest.__struct_fields__),
        ("a generate request", more_fields(GenerateRequest)),
        ("an embed request", more_fields(EmbedRequest)),
        ("an embedding", Embedding.__struct_fields__),
        ("a chunk", Chunk.__struct_fields__),
        ("an origin", Origin.__struct_fields__),
        ("a load", Load.__struct_fields__),
        ("a signed advert", adverts.SignedAdvert.__struct_fields__),
        ("an advert", adverts.Advert.__struct_fields__),
        ("a machine", adverts.Machine.__struct_fields__),
        ("a GPU", adverts.Gpu.__struct_fields__),
        ("a provider", adverts.ProviderAdvert.__struct_fields__),
        ("a batch", Batch.__struct_fields__),
        ("a claim", Entry._fields),
        ("a question", reachability.Question.__struct_fields__),
        ("a finding", reachability.Finding.__struct_fields__),
    ],
)
def test_the_tables_of_fields(what: str, fields: tuple[str, ...]) -> None:
    assert tuple(row[0] for row in tables(TEXT)[f"field of {what}"]) == fields


@pytest.mark.parametrize(
    "name",
    [
        protocol.PROTOCOL,
        gossip.ADVERTS,
        gossip.CLAIMS,
        YAMUX,
        NOISE,
        IDENTIFY,
        MESHSUB,
        f'"{adverts.CONTEXT.decode()}"'.replace("\0", "\\0"),
        DOMAIN.decode(),
        mdns.SERVICE,
        relay_messages.HOP,
        relay_messages.STOP,
        relay_messages.DCUTR,
        reachability.DIAL_BACK,
        join_link.PREFIX,
    ],
)
def test_names_on_the_wire(name: str) -> None:
    assert f"`{name}`" in TEXT
