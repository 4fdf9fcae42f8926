"""Headers, and which client serves which."""

import pytest

from promptmesh.providers.http_client import checked_headers, open_client
from promptmesh.providers.http_pool import HttpPool
from promptmesh.providers.https_pool import HttpsPool


@pytest.mark.parametrize("name", ["", "a b", "a\r\nb", "a:", "ü", "Host", "content-length"])
def test_a_header_that_would_break_the_head_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be set"):
        checked_headers({name: "x"})


@pytest.mark.parametrize("value", ["secret\r\nX: y", "secret\x00", "secret\n", "secret€"])
def test_a_header_value_that_would_break_the_head_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="X-Title") as caught:
        checked_headers({"X-Title": value})
    assert "secret" not in str(caught.value)


def test_own_headers_may_be_replaced() -> None:
    assert checked_headers({"User-Agent": "me"})["user-agent"] == "me"


def test_client_by_scheme() -> None:
    assert isinstance(open_client("http://host/v1", {}), HttpPool)
    assert isinstance(open_client("https://host/v1", {}), HttpsPool)
    with pytest.raises(ValueError, match="URL"):
        open_client("host/v1", {})
