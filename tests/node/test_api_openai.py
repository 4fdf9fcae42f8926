"""The handler of chat completions where something fails late."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fakes_router import Backends, setup
from serving import serving

from promptmesh.node.api_openai import OpenAIApi
from promptmesh.node.routes import Routes
from promptmesh.providers.base import Answering, Asked, ProviderUnavailable


class FailsOnLeaving(Backends):
    """Gives a whole answer, and fails after it."""

    @asynccontextmanager
    async def open(self, request: Asked, **how: Any) -> AsyncIterator[Answering]:
        async with super().open(request, **how) as answering:
            yield answering
        raise ProviderUnavailable("too late to matter")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_failure_after_the_whole_answer_is_no_fault_of_ours(
    caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    async with setup(FailsOnLeaving()) as made:
        names: Any = None  # only `GET /v1/models` needs them
        routes = Routes()
        routes.add("POST", "/", OpenAIApi(made.router, names, made.notes).chat_completions)
        async with serving(routes) as client:
            message = {"role": "user", "content": "hi"}
            body = {"model": "m", "stream": stream, "messages": [message]}
            answer = await client.post("/", json=body)
            assert (answer.status_code, "error" in answer.text) == (200, False)
            again = await client.post("/", json=body)  # the connection is as it was
            assert again.status_code == 200
    assert not [record for record in caplog.records if record.exc_info]
