"""The multipart parser: what clients send, byte for byte, and any bytes at all."""

from __future__ import annotations

import httpx
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.node.multipart import MAX_HEAD, MAX_PARTS, MultipartError, Part, parse

TYPE = "multipart/form-data; boundary=b"

#: As ipfshttpclient 0.7.0 and 0.8.0a2 send it, curl, and Kubo's own client.
IPFSHTTPCLIENT = (
    'multipart/form-data; boundary="8b37"',
    b'--8b37\r\nContent-Disposition: form-data; name="file"; filename="a%2Fb"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\nthe\r\ndata\r\n--8b37--\r\n",
    [Part("file", "a/b", "application/octet-stream", b"the\r\ndata")],
)
CURL = (
    "multipart/form-data; boundary=------------------------d74496d66958873e",
    b"--------------------------d74496d66958873e\r\n"
    b'Content-Disposition: form-data; name="file"; filename="x\\"y.txt"\r\n'
    b"Content-Type: text/plain\r\n\r\n\r\n--------------------------d74496d66958873e--\r\n",
    [Part("file", 'x"y.txt', "text/plain", b"")],
)
KUBO = (
    "multipart/form-data; boundary=0a1b",
    b"--0a1b\r\nAbspath-Encoded: %2Fhome%2Fx\r\nContent-Disposition: form-data; "
    b'name="file"; filename="a+b"\r\nContent-Type: application/x-directory\r\n\r\n\r\n'
    b'--0a1b\r\nContent-Disposition: form-data; name="file"; filename="a+b%2Fc"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n\0\xff\r\n--0a1b--\r\n",
    [
        Part("file", "a b", "application/x-directory", b""),
        Part("file", "a b/c", "application/octet-stream", b"\0\xff"),
    ],
)


@pytest.mark.parametrize(("content_type", "body", "parts"), [IPFSHTTPCLIENT, CURL, KUBO])
def test_what_clients_send(content_type: str, body: bytes, parts: list[Part]) -> None:
    assert parse(content_type, body) == parts


@given(st.lists(st.binary(max_size=100), max_size=5, min_size=1))
def test_two_libraries_are_understood(contents: list[bytes]) -> None:
    files = [("file", (f"n {i}", data)) for i, data in enumerate(contents)]
    for request in (
        httpx.Request("POST", "http://x", files=files),
        requests.Request("POST", "http://x", files=files).prepare(),
    ):
        body = request.read() if isinstance(request, httpx.Request) else request.body
        assert isinstance(body, bytes)
        parts = parse(str(request.headers["content-type"]), body)
        assert [part.data for part in parts] == contents
        assert [part.name for part in parts] == ["file"] * len(contents)


near = st.sampled_from(
    b'--b|--b\r\n|\r\n|--b--|\r\n--b\r\n|\r\n--b--\r\n|--|-| |\n|a: b|:|"|x|\xff|\0'.split(b"|")
)


@given(st.lists(near, max_size=25).map(b"".join))
def test_strange_bodies_raise_one_kind(body: bytes) -> None:
    try:
        parts = parse(TYPE, body)
    except MultipartError:
        return
    assert sum(len(part.data) for part in parts) < len(body)


@given(st.text(max_size=60) | st.text(max_size=30).map(lambda end: "multipart/form-data;" + end))
def test_strange_types_raise_one_kind(content_type: str) -> None:
    try:
        parse(content_type, b"--b\r\n\r\nx\r\n--b--")
    except MultipartError:
        return
    assert "boundary" in content_type.lower()


@given(st.binary(max_size=100).filter(lambda data: b"\r\n--b" not in b"\r\n" + data))
def test_data_come_whole(data: bytes) -> None:
    (part,) = parse(TYPE, b"preamble\r\n--b \t\r\n\r\n" + data + b"\r\n--b--\r\nepilogue")
    assert part == Part("", None, "", data)


def test_a_line_that_only_begins_like_the_boundary_is_data() -> None:
    (part,) = parse(TYPE, b"--b\r\n\r\n1\r\n--bb\r\n--b-\r\n--b--x\r\n2\r\n--b--\r\nignored")
    assert part.data == b"1\r\n--bb\r\n--b-\r\n--b--x\r\n2"


@pytest.mark.parametrize(
    ("content_type", "body", "says"),
    [
        ("application/json", b"{}", "not multipart"),
        ("multipart/mixed; boundary=b", b"--b\r\n\r\n\r\n--b--", "not multipart"),
        ("multipart/form-data", b"", "boundary"),
        ("multipart/form-data; boundary=" + "b" * 71, b"", "boundary"),
        ('multipart/form-data; boundary="b "', b"", "boundary"),
        ("multipart/form-data; boundary=b; boundary=c", b"", "malformed"),
        (TYPE, b"", "closing"),
        (TYPE, b"--b\r\n\r\nx", "closing"),
        (TYPE, b"--b\r\n\r\nx\r\n--b", "closing"),
        (TYPE, b"--b\n\nx\n--b--\n", "closing"),
        (TYPE, b"--b\r\n\r\n--b--\r\n", "head"),
        (TYPE, b"--b\r\na: b\r\n\r\n--b--\r\n", "head"),
        (TYPE, b"--b\r\nno field\r\n\r\nx\r\n--b--", "malformed"),
        (TYPE, b"--b\r\na: 1\r\nA: 2\r\n\r\nx\r\n--b--", "malformed"),
        (TYPE, b"--b\r\na: \xff\r\n\r\nx\r\n--b--", "UTF-8"),
        (TYPE, b"--b\r\na: " + b"x" * MAX_HEAD + b"\r\n\r\nx\r\n--b--", "too long"),
        (TYPE, b"--b\r\nContent-Transfer-Encoding: base64\r\n\r\nx\r\n--b--", "encoding"),
        (TYPE, b"--b\r\n\r\n\r\n" * (MAX_PARTS + 1) + b"--b--", "parts"),
        (TYPE, b"--b\r\n\r\n" + b"\r\n--bb" * 2000 + b"\r\n--b--", "begin like it"),
    ],
)
def test_what_is_refused(content_type: str, body: bytes, says: str) -> None:
    with pytest.raises(MultipartError, match=says):
        parse(content_type, body)
