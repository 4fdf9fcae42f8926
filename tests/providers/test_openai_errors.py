"""Errors of servers, in their many forms, in our words."""

import json
from typing import Any

import pytest
from fakes_gemini import detail
from fakes_gemini import error as gemini_error
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers.base import (
    ContentFiltered,
    ContextTooLong,
    GenerateError,
    ModelNotFound,
    ProviderRefused,
    ProviderUnavailable,
    RequestRejected,
)
from promptmesh.providers.openai_errors import (
    DAY_USED_UP,
    TOO_OFTEN,
    ErrorReader,
    ServerError,
    read_error,
    retry_after,
)

NOW = 1_700_000_000.0
KEY = "sk-abcdef0123456789"
READER = ErrorReader("vllm", [KEY, "", "abc"])


def failure(status: int, body: Any, **headers: str) -> GenerateError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return READER.reply(status, named, READER.read(raw), NOW)


def error(message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, **fields}}


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "no luck", "type": "t", "code": "c"}},
        {"error": "no luck"},
        {"detail": "no luck"},
        {"detail": [{"loc": ["body", "messages"], "msg": "no luck", "type": "missing"}]},
        {"object": "error", "message": "no luck", "code": 400},
        {"message": "no luck"},
        "no luck",
        b"no luck\n",
    ],
)
def test_forms_of_an_error(body: Any) -> None:
    got = failure(500, body)
    assert str(got) == "vllm answered 500: no luck"


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>oh dear</html>", b"null", b"[]", b"{}", b"17", b"[1]", b'{"error":null}'],
)
def test_error_that_says_nothing(body: bytes) -> None:
    assert str(failure(500, body)) == "vllm answered 500"


@pytest.mark.parametrize("status", [400, 422])
def test_request_rejected(status: int) -> None:
    got = failure(status, error("top_p must be at most 1", param="top_p"))
    assert type(got) is RequestRejected
    assert got.field == "top_p"


def test_field_of_a_validation_error() -> None:
    got = failure(422, {"detail": [{"loc": ["body", "messages", 0], "msg": "Field required"}]})
    assert type(got) is RequestRejected
    assert got.field == "messages.0"


@pytest.mark.parametrize(
    "body",
    [
        error("too long", code="context_length_exceeded"),
        error("This model's maximum context length is 4096 tokens. However, you requested 5000"),
        error("the request exceeds the available context size", type="exceed_context_size_error"),
        error("The prompt is too long: 9000 tokens"),
        error("Requested token count exceeds the model's maximum context length of 8 tokens"),
        {"object": "error", "message": "This model's maximum context length is 8", "code": 400},
        error("input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000"),
    ],
)
def test_context_too_long(body: Any) -> None:
    assert type(failure(400, body)) is ContextTooLong


def test_body_too_large_for_the_server() -> None:
    assert type(failure(413, b"")) is ContextTooLong


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, error("blocked", code="content_filter")),
        (400, error("The response was filtered due to Azure OpenAI's content management policy")),
        (422, error("x", code="content_policy_violation")),
        (403, error("no", code=403, metadata={"flagged_input": "...", "reasons": ["violence"]})),
    ],
)
def test_content_filtered(status: int, body: Any) -> None:
    assert type(failure(status, body)) is ContentFiltered


@pytest.mark.parametrize("status", [401, 403])
def test_key_refused(status: int) -> None:
    got = failure(status, error("no"))
    assert type(got) is ProviderRefused
    assert "key" in str(got)


def test_key_refused_as_a_bad_request() -> None:
    got = failure(400, error("API key not valid. Please pass a valid API key."))
    assert type(got) is ProviderRefused
    assert "api_key_env" in str(got)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (402, error("more credits")),
        (429, error("q", code="insufficient_quota")),
        (400, error("Your credit balance is too low to access the Anthropic API.")),
        (400, error("You have reached your specified API usage limits.")),
    ],
)
def test_no_credit(status: int, body: Any) -> None:
    got = failure(status, body)
    assert type(got) is ProviderRefused
    assert "credit" in str(got)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "The model `x` does not exist."),
        (404, 'model "x" not found, try pulling it first'),
        (400, "No models loaded. Please load a model."),
    ],
)
def test_missing_model_lets_others_try(status: int, message: str) -> None:
    got = failure(status, error(message))
    assert type(got) is ProviderRefused
    assert not isinstance(got, ModelNotFound)
    assert message in str(got)
    assert "base_url" not in str(got)


@pytest.mark.parametrize("status", [404, 405])
def test_wrong_path(status: int) -> None:
    got = failure(status, {"detail": "Not Found"})
    assert type(got) is ProviderRefused
    assert "ends in /v1" in str(got)


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_try_later_or_elsewhere(status: int) -> None:
    got = failure(status, error("busy"), retry_after="7")
    said_no = status in (409, 425, 429)
    assert type(got) is (ProviderRefused if said_no else ProviderUnavailable)
    assert got.retry_after == 7.0
    assert failure(status, error("busy")).retry_after == (TOO_OFTEN if status == 429 else None)


def test_id_that_the_vendor_knows_the_request_by() -> None:
    assert str(failure(500, error("no"), request_id="req_1")).endswith("500: no (request req_1)")


@pytest.mark.parametrize(
    ("kind", "type_"),
    [
        ("invalid_request_error", RequestRejected),
        ("request_too_large", ContextTooLong),
        ("rate_limit_error", ProviderRefused),
        ("overloaded_error", ProviderUnavailable),
        ("something_new", ProviderUnavailable),
    ],
)
def test_kind_of_an_error_inside_a_stream(kind: str, type_: type[GenerateError]) -> None:
    body = {"type": "error", "error": {"type": kind, "message": "no"}, "request_id": "req_1"}
    assert type(READER.event(READER.read(json.dumps(body).encode()))) is type_


def test_missing_model_of_anthropic() -> None:
    got = failure(
        404, {"type": "error", "error": {"type": "not_found_error", "message": "model: m"}}
    )
    assert str(got) == "vllm answered 404: model: m"


def test_fault_of_the_server_is_not_read_as_one_of_the_request() -> None:
    got = failure(503, error("the content filter is down; the context size is unknown"))
    assert type(got) is ProviderUnavailable


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirect_names_the_place(status: int) -> None:
    got = failure(status, b"", location="https://host/v1/")
    assert type(got) is ProviderRefused
    assert "https://host/v1/" in str(got)
    assert type(failure(status, b"")) is ProviderRefused


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("2.5", 2.5),
        (" 7 ", 7.0),
        ("-3", 0.0),
        ("1e99", 86400.0),
        ("Tue, 14 Nov 2023 22:13:30 GMT", 10.0),
        ("Tue, 14 Nov 2023 22:13:30 -0000", 10.0),
        ("Tue, 14 Nov 2023 22:13:10 GMT", 0.0),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("Tue, 99 Nov 2023 22:13:30 GMT", None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert retry_after({"retry-after": value}, NOW) == seconds


def test_retry_after_in_milliseconds() -> None:
    assert retry_after({"retry-after-ms": "1500", "retry-after": "2"}, NOW) == 1.5


def test_no_retry_after() -> None:
    assert retry_after({}, NOW) is None


def test_error_in_a_reply_with_status_200() -> None:
    for body, kind in (
        (error("slow down", code=429), ProviderRefused),
        (error("slow down", code="rate_limit_exceeded"), ProviderUnavailable),
        (error("bad", code=400), RequestRejected),
        (error("bad", code="400"), RequestRejected),
        (error("too long", code="context_length_exceeded"), ContextTooLong),
        (error("blocked", code="content_filter"), ContentFiltered),
        ({"error": "the prompt is too long"}, ContextTooLong),
        ({"error": {}}, ProviderUnavailable),
        ({}, ProviderUnavailable),
    ):
        got = READER.event(READER.read(json.dumps(body).encode()))
        assert type(got) is kind, body


# --- the key -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        error(f"Incorrect API key provided: {KEY}."),
        error("no", code=KEY),
        error("no", param=KEY),
        error("a " * 240 + KEY),
        error("no", param="x").copy() | {"message": KEY},
        f"no: {KEY}".encode(),
        json.dumps(error(f"no {KEY}")).replace("-", "\\u002d").encode(),
    ],
)
def test_key_is_never_repeated(body: Any) -> None:
    for status in (200, 400, 401, 429, 500):
        got = failure(status, body)
        shown = f"{got} {got.field}"
        assert KEY not in shown
        assert KEY[:8] not in shown
    assert KEY not in str(failure(302, b"", location=f"https://host/?key={KEY}"))


def test_message_is_one_short_printable_line() -> None:
    got = failure(500, error("a\r\n\x1b[31mb\u202e" + "c" * 10_000))
    assert str(got).startswith("vllm answered 500: a [31mbccc")
    assert len(str(got)) < 600


@given(st.binary(max_size=300))
def test_random_bodies(body: bytes) -> None:
    for status in (200, 302, 400, 429, 500):
        READER.reply(status, {}, READER.read(body), NOW)
    READER.event(READER.read(body))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["error", "detail", "message", "code", "type", "param", "metadata", "loc", "msg"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_random_json_bodies(value: Any) -> None:
    read = READER.read(json.dumps(value).encode())
    for status in (302, 400, 429, 500):
        assert isinstance(READER.reply(status, {}, read, NOW), GenerateError)
    assert isinstance(READER.event(read), GenerateError)


@given(st.text(max_size=40) | st.datetimes().map(lambda d: f"{d:%a, %d %b %Y %H:%M:%S} GMT"))
def test_random_retry_after(value: str) -> None:
    seconds = retry_after({"retry-after": value}, NOW)
    assert seconds is None or 0 <= seconds <= 86400


def test_deeply_nested_body() -> None:
    assert read_error(b'{"error":' * 100_000).message.startswith('{"error"')


def test_what_to_do_where_the_key_is_wrong_is_the_providers_own() -> None:
    reader = ErrorReader("copilot", [], key="log in: `copilot login`")
    assert "(log in: `copilot login`)" in str(reader.reply(401, {}, ServerError(), 0.0))


def test_a_prompt_over_the_budget_is_too_long() -> None:
    said = ServerError(message="Request exceeds the model's prompt budget (140038 tokens)")
    assert type(ErrorReader("copilot", []).event(said)) is ContextTooLong
    said = ServerError(kind="model_max_prompt_tokens_exceeded")
    assert type(ErrorReader("copilot", []).reply(400, {}, said, 0.0)) is ContextTooLong


# --- Google's form -------------------------------------------------------------------------------


def google(code: int, message: str, status: str, *details: dict[str, Any]) -> GenerateError:
    return failure(code, gemini_error(code, message, status, *details))


def test_google_a_key_that_is_not_valid_is_a_400() -> None:
    found = google(
        400,
        "API key not valid. Please pass a valid API key.",
        "INVALID_ARGUMENT",
        detail("ErrorInfo", reason="API_KEY_INVALID", domain="googleapis.com"),
    )
    assert type(found) is ProviderRefused
    assert "check the key" in found.message


def test_google_says_in_the_body_how_long_to_wait() -> None:
    quota = detail(
        "QuotaFailure",
        violations=[{"quotaId": "GenerateRequestsPerMinutePerProjectPerModel-FreeTier"}],
    )
    wait = detail("RetryInfo", retryDelay="23.5s")
    found = google(429, "You exceeded your current quota", "RESOURCE_EXHAUSTED", quota, wait)
    assert type(found) is ProviderRefused
    assert found.retry_after == 23.5


@pytest.mark.parametrize("delay", ["", "soon", "-1s", None, 7, ["1s"], "99999999999999s"])
def test_google_a_delay_that_is_none(delay: Any) -> None:
    found = google(429, "no", "RESOURCE_EXHAUSTED", detail("RetryInfo", retryDelay=delay))
    assert found.retry_after == TOO_OFTEN


def test_google_the_quota_of_a_day() -> None:
    quota = detail(
        "QuotaFailure",
        violations=[{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}],
    )
    found = google(429, "no", "RESOURCE_EXHAUSTED", quota, detail("RetryInfo", retryDelay="5s"))
    assert found.retry_after == DAY_USED_UP
    assert "the day's quota is used up" in found.message


def test_google_a_model_that_is_not_there() -> None:
    message = (
        "models/gemini-9 is not found for API version v1beta, or is not supported for "
        "generateContent. Call ListModels to see the list of available models."
    )
    found = google(404, message, "NOT_FOUND")
    assert type(found) is ProviderRefused
    assert "base_url" not in found.message


def test_google_too_many_tokens() -> None:
    message = (
        "The input token count (1048577) exceeds the maximum number of tokens allowed (1048576)."
    )
    assert type(google(400, message, "INVALID_ARGUMENT")) is ContextTooLong


def test_google_a_place_it_does_not_serve() -> None:
    message = "User location is not supported for the API use."
    assert type(google(400, message, "FAILED_PRECONDITION")) is ProviderRefused


def test_google_a_list_of_errors() -> None:
    body = [gemini_error(500, "An internal error has occurred", "INTERNAL")]
    assert failure(500, body).message == "vllm answered 500: An internal error has occurred"


@given(st.recursive(st.none() | st.text(max_size=5), lambda v: st.lists(v, max_size=3)))
def test_google_any_details(details: Any) -> None:
    body = {"error": {"code": 429, "message": "no", "details": details}}
    assert failure(429, body).retry_after == TOO_OFTEN
