"""Asks a server which models it has, which costs nothing, and remembers what it said."""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from .base import Health
from .http_address import parse_base_url
from .http_answer import explain, read_body
from .http_client import HttpClient
from .http_reply import BrokenReply, HttpFailure
from .openai_errors import ErrorReader, ServerError, blames_key

#: Seconds between two questions for the models; while the server is down first the one, then twice
#: as long each time up to the other.
REFRESH = 30.0
FIRST_RETRY, LAST_RETRY = 1.0, 10.0
#: The same for a server on the public internet, whose list may be long.
PUBLIC_REFRESH = 300.0
#: Seconds. `Provider.check` may take 2.
CHECK_TIME = 1.9
#: OpenRouter's list of 400 models has 700 kB.
MAX_MODEL_LIST = 8 * 1024 * 1024


class ModelList:
    """The models of one server, and its health as seen by asking for them.

    `learn` takes the body of the list, and raises `ValueError` for one it cannot read. A server
    whose models are `configured` needs no list.
    """

    def __init__(
        self,
        client: HttpClient,
        errors: ErrorReader,
        base_url: str,
        path: str,
        learn: Callable[[bytes], None],
        *,
        configured: bool,
    ) -> None:
        address = parse_base_url(base_url)
        self._client = client
        self._errors = errors
        self._path = path
        self._learn = learn
        self._configured = configured
        self._where = str(address)
        self._private = address.private
        self._health = Health(state="starting", reason="it was not asked yet")
        #: The last list was late.
        self._late = False
        #: When `check` may ask the server again.
        self._ask_again = -math.inf

    async def check(self) -> Health:
        """Ask for the models, and remember them.

        A public server, and one that refused, is not asked at each call: what it said last counts.
        """
        if trio.current_time() >= self._ask_again:
            self._health = await self._ask()
        return self._health

    async def run(self) -> None:
        """Ask for the models now and then, until cancelled; close the connections at the end."""
        delay = FIRST_RETRY
        try:
            while True:
                if (await self.check()).state == "ready":
                    delay = FIRST_RETRY
                    await trio.sleep(REFRESH)
                else:
                    await trio.sleep(delay)
                    delay = min(2 * delay, LAST_RETRY)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.0):
                await self._client.aclose()

    async def _ask(self) -> Health:
        self._ask_again = -math.inf if self._private else trio.current_time() + LAST_RETRY
        was_late, self._late = self._late, False
        with trio.move_on_after(CHECK_TIME):
            try:
                async with self._client.request("GET", self._path) as reply:
                    if reply.status != 200:
                        return self._unwell(reply.status, self._errors.read(await explain(reply)))
                    self._take(await read_body(reply, MAX_MODEL_LIST))
            except HttpFailure as error:
                reason = self._errors.redact(str(error))
                return Health(state="unavailable", reason=reason, hint=self._not_reached())
            if not self._private:
                self._ask_again = trio.current_time() + PUBLIC_REFRESH
            return Health()
        if self._health.state == "ready" and not was_late:
            self._late = True
            return self._health  # it may be busy with answers: it has a second chance
        return Health(
            state="unavailable",
            reason=f"{self._where} did not list its models within 2 s",
            hint="look at the server: it is overloaded, or hangs",
        )

    def _not_reached(self) -> str:
        if self._private:
            return f"start the server at {self._where}, or correct base_url"
        return "is this machine online? otherwise wait, or correct base_url"

    def _take(self, body: bytes) -> None:
        try:
            self._learn(body)
        except ValueError as error:
            raise BrokenReply(str(error)) from None

    def _unwell(self, status: int, said: ServerError) -> Health:
        reason = f"{self._where} answered {status}" + (f": {said.message}" if said.message else "")
        if status != 503:
            self._ask_again = trio.current_time() + LAST_RETRY
        if status == 403 or blames_key(status, said):
            return Health(state="unavailable", reason=reason, hint=self._errors.key_hint)
        if status == 503:
            return Health(state="starting", reason=reason, hint="wait: it may be loading a model")
        if status == 404 and self._configured:
            return Health()  # It lists no models, and need not: they are configured.
        return Health(state="unavailable", reason=reason, hint=self._errors.place_hint)
