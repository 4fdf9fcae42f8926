"""The list of models of a server of the OpenAI dialect (`GET /models`)."""

from __future__ import annotations

from typing import Any

import msgspec

MAX_MODELS = 5000


class _Architecture(msgspec.Struct):
    input_modalities: list[str] | None = None
    output_modalities: list[str] | None = None


class ListedModel(msgspec.Struct):
    """What servers say of a model: each uses another one of these for its context length."""

    id: str
    max_model_len: Any = None
    context_length: Any = None
    meta: Any = None
    architecture: _Architecture | None = None
    type: Any = None
    capabilities: Any = None
    #: llama.cpp's server, where it has several models: `{"value": "loaded"}`.
    status: Any = None

    @property
    def loaded(self) -> bool | None:
        """Is it in memory? None if the server does not say."""
        value = self.status.get("value") if isinstance(self.status, dict) else None
        return value == "loaded" if isinstance(value, str) else None

    @property
    def embeds(self) -> bool:
        """Does the server say that it is for embeddings, and for nothing else?

        OpenRouter says it by what comes out, Infinity by capabilities, Together and LM Studio by a
        type. vLLM, Ollama and llama.cpp do not say.
        """
        out = self.architecture.output_modalities if self.architecture else None
        told = self.capabilities if isinstance(self.capabilities, list) else [self.type]
        return any(
            words and all(isinstance(w, str) and w.startswith("embed") for w in words)
            for words in (out, told)
        )

    @property
    def context(self) -> int | None:
        """The context length in tokens."""
        meta = self.meta if isinstance(self.meta, dict) else {}
        for value in (
            self.max_model_len,
            self.context_length,
            meta.get("n_ctx"),
            meta.get("n_ctx_train"),
        ):
            if type(value) is int and 0 < value < 2**53:
                return value
        return None

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it takes; empty if the server does not say."""
        return tuple(self.architecture.input_modalities or ()) if self.architecture else ()


class _List(msgspec.Struct):
    data: list[ListedModel] | None = None


_decode = msgspec.json.Decoder(_List | list[ListedModel]).decode


def read_models(body: bytes) -> dict[str, ListedModel]:
    """The models by id, in the server's order. Raises `ValueError`."""
    try:
        found = _decode(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the list of models cannot be read: {error}") from None
    listed = found if isinstance(found, list) else found.data or []
    return {model.id: model for model in listed[:MAX_MODELS] if model.id}
