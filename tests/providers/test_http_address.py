"""Base URLs taken apart."""

import pytest

from promptmesh.providers.http_address import parse_base_url


@pytest.mark.parametrize(
    ("url", "scheme", "host", "port", "path"),
    [
        ("http://127.0.0.1:8000/v1", "http", "127.0.0.1", 8000, "/v1"),
        ("http://localhost", "http", "localhost", 80, ""),
        ("http://localhost:1234/v1/", "http", "localhost", 1234, "/v1"),
        ("https://openrouter.ai/api/v1", "https", "openrouter.ai", 443, "/api/v1"),
        ("http://[::1]:11434/v1", "http", "::1", 11434, "/v1"),
        ("http://bücher.example/v1", "http", "xn--bcher-kva.example", 80, "/v1"),
    ],
)
def test_base_url(url: str, scheme: str, host: str, port: int, path: str) -> None:
    assert parse_base_url(url) == (scheme, host, port, path)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "ftp://host/v1",
        "http://",
        "http://:80/v1",
        "http://host:0/v1",
        "http://host:99999/v1",
        "http://host:x/v1",
        "http://[::1/v1",
        "http://host/v1?a=b",
        "http://host/v1#a",
        "http://host/a b",
        "http://host/\r\nX: y",
        "http://host/ü",
        "http://" + "a" * 70 + ".example/",
    ],
)
def test_wrong_base_url(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        parse_base_url(url)


def test_a_password_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="key separately") as caught:
        parse_base_url("http://user:hunter2@host/v1")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "private"),
    [
        ("127.0.0.1", True),
        ("[::1]", True),
        ("192.168.1.5", True),
        ("100.64.3.4", True),
        ("[fe80::1]", True),
        ("localhost", True),
        ("gpu-box", True),
        ("gpu.local", True),
        ("8.8.8.8", False),
        ("api.openai.com", False),
        ("localhost.example.com", False),
    ],
)
def test_private_hosts(host: str, private: bool) -> None:
    assert parse_base_url(f"http://{host}/v1").private is private


def test_address_as_text() -> None:
    assert str(parse_base_url("http://[::1]:9/v1")) == "[::1]:9"
    assert str(parse_base_url("http://host/v1")) == "host:80"
