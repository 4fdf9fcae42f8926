"""What each fault of a model server comes to: for the caller, for the server, and for who is next.

The table of `docs/failures.md` is made of these, and the tests drive a node through each.
"""

from __future__ import annotations

from dataclasses import dataclass

from faults import FAULTS, WHOLE

#: Seconds, of a server that is late: enough for a busy machine to bring three requests to it.
LATE_S = 8.0
#: Those of `FAULTS` that are no fault, or have a test of their own.
NO_CASE = {"healthy", "smaller", "larger", "flapping"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One fault. See the module."""

    #: A key of `FAULTS`.
    fault: str
    #: For people.
    what: str
    status: int = 502
    code: str = "provider_unavailable"
    #: What the message says of it.
    says: str = ""
    #: It strikes after the first token: the caller has the text so far.
    begun: bool = False
    retry_after: int | None = None
    #: Another candidate is asked, if there is one.
    elsewhere: bool = True
    #: The server sees that its client leaves.
    left: bool = False
    #: It may pass at once: the server is asked once more, if there is no other.
    again: bool = False
    #: After a second one it is left alone for a while.
    paused: bool = True
    #: The answer, where it is one after all, and how it ended.
    text: str | None = None
    finish: str = "stop"
    #: The seconds that the request gives itself.
    deadline: float | None = None
    #: It is found out by its server's being later than `LATE_S`.
    late: bool = False
    #: The server goes on and on: what counts is how much of it a node keeps.
    endless: bool = False

    @property
    def stored(self) -> bool:
        """Does the answer come into the cache?"""
        return self.text is not None and self.finish == "stop"

    @property
    def row(self) -> tuple[str, ...]:
        """The row of the table."""
        return (self.what, self._whole, self._streamed, self._server, self._next)

    @property
    def _whole(self) -> str:
        if self.text is not None:
            return f"200, `{self.finish}`" if self.text else "200, an empty text"
        after = f", `Retry-After: {self.retry_after}`" if self.retry_after else ""
        return f"{self.status} `{self.code}`" + after + (", `partial`" if self.begun else "")

    @property
    def _streamed(self) -> str:
        if not self.begun:
            return "the same"
        if self.text is not None:
            return f"the text, `{self.finish}`, `[DONE]`"
        return f"the text so far, then an error event `{self.code}` with `partial`"

    @property
    def _server(self) -> str:
        if self.fault == REFUSED:
            return "nothing"
        requests = "two requests" if self.again else "one request"
        return (
            (f"{requests}, whose clients leave" if self.again else "its client leaves")
            if self.left
            else requests
        )

    @property
    def _next(self) -> str:
        if self.text is not None:
            return "stored" if self.stored else "not stored"
        if self.fault.startswith("context"):
            return "a larger model"
        if self.begun and self.paused:
            return "one that can go on, then a pause"
        steps = {"another candidate": self.elsewhere, "a pause": self.paused}
        return ", then ".join(step for step, taken in steps.items() if taken) or "nothing"


def before(fault: str, what: str, **fields: object) -> Case:
    """It strikes before the first token."""
    return Case(fault=fault, what=what, **fields)  # type: ignore[arg-type]


def after(fault: str, what: str, **fields: object) -> Case:
    """It strikes after the first token."""
    known: dict[str, object] = {
        "code": "stream_interrupted",
        "begun": True,
        "elsewhere": False,
    }
    return Case(fault=fault, what=what, **(known | fields))  # type: ignore[arg-type]


def late(fault: str, what: str, **fields: object) -> Case:
    """There is no token in time."""
    known = {
        "status": 504,
        "code": "deadline_exceeded",
        "left": True,
        "late": True,
        "says": "no token within",
    }
    return Case(fault=fault, what=what, **(known | fields))  # type: ignore[arg-type]


def rejected(fault: str, what: str, **fields: object) -> Case:
    """The request is at fault."""
    known = {"status": 400, "code": "request_rejected", "elsewhere": False, "paused": False}
    return Case(fault=fault, what=what, **(known | fields))  # type: ignore[arg-type]


def whole(fault: str, what: str, text: str = WHOLE) -> Case:
    """It is an answer after all."""
    return Case(fault=fault, what=what, text=text, begun=bool(text), paused=False)


def context(server: str) -> Case:
    return rejected(
        f"context-{server}",
        f"a context that is too long, in the words of {server}",
        code="context_length_exceeded",
        says="context",
    )


REFUSED = "refused"

CASES = (
    before(REFUSED, "connection refused", says="connection refused"),
    late("silence", "accepts, and says nothing"),
    before("reset-before-headers", "a reset before the headers", says="without a reply"),
    before("not-http", "something else than HTTP", says="not valid HTTP"),
    before("endless-headers", "headers without end", says="larger than", left=True, endless=True),
    rejected("status-400", "400: the request is wrong", says="top_k must be"),
    before("status-401", "401", says="api_key_env"),
    before("status-402", "402", says="no credit left"),
    before("status-403", "403", says="may this key use this model"),
    before("status-404", "404: it does not have the model", says="does not exist"),
    before("status-408", "408", says="408"),
    before("status-429", "429", says="Rate limit reached", status=503, retry_after=2),
    before("status-429-retry-after", "429 with `Retry-After: 7`", status=503, retry_after=7),
    before("status-500", "500", says="out of memory", again=True),
    before("status-502", "502", says="502", again=True),
    before("status-503-retry-after", "503 with `Retry-After: 7`", status=503, retry_after=7),
    before("redirect", "a redirect", says="redirects to"),
    before("web-page", "a web page", says="web page"),
    before(
        "endless-error",
        "500 with a body without end",
        says="answered 500",
        left=True,
        again=True,
        endless=True,
    ),
    context("vllm"),
    context("llama.cpp"),
    context("ollama"),
    context("openai"),
    rejected(
        "filter-before",
        "a content filter refuses the prompt",
        code="content_filter",
        says="content management policy",
    ),
    rejected(
        "filter-event",
        "a content filter ends the answer by an error",
        code="content_filter",
        says="content management policy",
        begun=True,
    ),
    after(
        "filter-finish",
        "a content filter ends the answer by its `finish_reason`",
        text="Once upon",
        finish="content_filter",
        paused=False,
    ),
    before("reset-after-headers", "a reset after the headers", says="ended before the reply did"),
    late("hang", "headers, then no token"),
    late("only-pings", "comments, and no token"),
    late("drip", "a byte a second"),
    before("error-first", "an error in place of the first token", says="the engine is dead"),
    before("malformed-first", "no JSON in place of the first token", says="cannot be read"),
    before("empty-body", "an empty body", says="end marker"),
    before("only-done", "`[DONE]` and nothing else", says="end marker"),
    before("length-too-long", "less than its `Content-Length`", says="ended before the reply did"),
    before("length-too-short", "more than its `Content-Length`", says="cannot be read"),
    before("endless-line", "a line without end", says="is longer than", left=True, endless=True),
    before(
        "endless-json", "a whole answer without end", says="is longer than", left=True, endless=True
    ),
    after("reset-in-a-chunk", "a reset in the middle of a chunk", says="ended before"),
    after("stall", "tokens, then silence", says="no token for", left=True, late=True),
    after("no-end-marker", "an end without `finish_reason`", says="end marker"),
    after("done-without-finish", "`[DONE]` without `finish_reason`", says="end marker"),
    after("reset-after-finish", "a reset after `finish_reason`", says="ended before"),
    after("strange-finish", "a `finish_reason` that says it failed", says="ended it by 'error'"),
    after("malformed-event", "an event that is no JSON", says="cannot be read"),
    after("invalid-utf8", "an event that is no UTF-8", says="cannot be read"),
    after("wrong-types", "JSON of other types", says="cannot be read"),
    after("error-event", "an error in the stream", says="out of memory"),
    after(
        "endless-answer", "an answer that is too large", says="longer than", left=True, endless=True
    ),
    after(
        "never-ending",
        "an answer that takes longer than the request may",
        status=504,
        code="deadline_exceeded",
        says="no whole answer within",
        left=True,
        paused=False,
        deadline=LATE_S,
    ),
    whole("no-done", "`finish_reason` without `[DONE]`"),
    whole("duplicate-finish", "`finish_reason` and `[DONE]` twice"),
    whole("empty-answer", "an answer without a token", text=""),
    whole("not-streamed", "an answer that is not streamed"),
)

assert {case.fault for case in CASES} == FAULTS.keys() - NO_CASE | {REFUSED}
