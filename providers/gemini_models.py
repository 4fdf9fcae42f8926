"""The list of Gemini's models (`GET /v1beta/models`)."""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec

#: Parts of the names of models that speak, draw or listen: the list does not tell them from those
#: that write.
_NOT_TEXT = re.compile(r"(^|-)(image|tts|audio|live)(-|$)")
#: The list comes in pages of so many at most; Google has fewer than 100 models.
PAGE = 1000
_MAX_CONTEXT = 2**53


class GeminiModel(NamedTuple):
    """A model as it is listed."""

    id: str
    context: int | None
    generates: bool
    embeds: bool


class _Model(msgspec.Struct, rename="camel"):
    name: str
    input_token_limit: int | None = None
    supported_generation_methods: list[str] | None = None


class _Page(msgspec.Struct):
    models: list[_Model] | None = None


_decode = msgspec.json.Decoder(_Page).decode


def read_models(body: bytes) -> dict[str, GeminiModel]:
    """The models by id.

    Those that neither generate text nor make embeddings are left out. Raises `ValueError`.
    """
    try:
        page = _decode(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the list of models cannot be read: {error}") from None
    found = map(_read, page.models or ())
    return {m.id: m for m in found if m.id and (m.generates or m.embeds)}


def _read(model: _Model) -> GeminiModel:
    methods = model.supported_generation_methods
    limit, name = model.input_token_limit, model.name.removeprefix("models/")
    return GeminiModel(
        id=name,
        context=limit if limit is not None and 0 < limit < _MAX_CONTEXT else None,
        # A server that does not say what a model is for, is asked for text.
        generates=(methods is None or "generateContent" in methods) and not _NOT_TEXT.search(name),
        embeds=methods is not None and "embedContent" in methods,
    )
