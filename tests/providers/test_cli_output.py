"""What the real `claude` and `gemini` commands said, recorded, in each case."""

import pytest
from cli_output import play
from faults import PARTIAL, WHOLE
from vendor_replies import COMPLETION_TOKENS, PROMPT_TOKENS

from promptmesh.providers.base import (
    Completion,
    ContextTooLong,
    FinishReason,
    GenerateError,
    ProviderRefused,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
    Usage,
)

pytestmark = pytest.mark.parametrize("vendor", ["claude", "gemini"])


def test_an_answer(vendor: str) -> None:
    assert play(vendor, "ok") == Completion(
        text=WHOLE,
        finish_reason="stop",
        usage=Usage(prompt_tokens=PROMPT_TOKENS, completion_tokens=COMPLETION_TOKENS),
    )
    assert play(vendor, "echo").text == "Tell me a tale."
    reasoned = play(vendor, "reason")
    assert reasoned.text == WHOLE
    assert bool(reasoned.reasoning) is (vendor == "claude")


@pytest.mark.parametrize(("case", "reason"), [("truncate", "length"), ("filter", "content_filter")])
def test_an_answer_that_was_cut_is_told_from_a_whole_one(
    vendor: str, case: str, reason: FinishReason
) -> None:
    """Claude would ask for more, and at last call it an error; Gemini calls both a success."""
    found = play(vendor, case)
    assert (found.text, found.finish_reason) == (PARTIAL, reason)


@pytest.mark.parametrize(
    ("case", "kind", "claude", "gemini"),
    [
        ("e400", RequestRejected, "a field that is wrong", ""),
        ("badkey", ProviderRefused, "Incorrect API key", "check the key"),
        ("e401", ProviderRefused, "Incorrect API key", "check the key"),
        ("e402", ProviderRefused, "no credit left", ""),
        ("e403", ProviderRefused, "may not use this model", ""),
        ("e404", ProviderRefused, "may not exist", "does not exist"),
        ("e429", ProviderRefused, "429", "Rate limit"),
        ("e500", ProviderUnavailable, "500", ""),
        ("e503", ProviderUnavailable, "503", ""),
        ("html", ProviderUnavailable, "502", ""),
        ("context", ContextTooLong, "too long", ""),
        ("empty", ProviderUnavailable, "an empty answer", "empty response"),
        ("badjson", ProviderUnavailable, "without receiving any events", "JSON"),
        # Claude's command does not tell what had come by then.
        ("drop", None, "Connection to the API was lost", "broke off"),
        ("reset", None, "Connection to the API was lost", "broke off"),
        ("streamerr", StreamInterrupted, "the engine has died", "without a finish reason"),
        ("stall", StreamInterrupted, "without a result", "broke off"),
        ("hang", ProviderUnavailable, "without a result", "gemini: "),
    ],
)
def test_failures(
    vendor: str, case: str, kind: type[GenerateError] | None, claude: str, gemini: str
) -> None:
    """`gemini`: what its error says, where it is not the same."""
    if kind is None:
        kind = ProviderUnavailable if vendor == "claude" else StreamInterrupted
    with pytest.raises(GenerateError) as caught:
        play(vendor, case)
    found = caught.value
    assert type(found) is kind
    assert (gemini if gemini and vendor == "gemini" else claude) in found.message
    assert found.partial == (PARTIAL if kind is StreamInterrupted else "")
