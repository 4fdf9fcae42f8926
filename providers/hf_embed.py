"""Embeddings by a transformers model: its last hidden states pooled, at length 1.

How they are pooled is what a sentence-transformers folder says in `1_Pooling/config.json`: the mean
over the tokens, which also holds where nothing is said, or the first token. A text that is longer
than the model's context is refused: cut, its vector would be that of another text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from transformers import AutoModel

from .base import (
    ContextTooLong,
    Embedding,
    EmbedRequest,
    Input,
    ModelOffer,
    RequestRejected,
    Usage,
)
from .hf_frames import Load, Loaded
from .hf_load import (
    LoadError,
    choose_device,
    choose_dtype,
    find,
    from_source,
    hub_folder,
    load_tokenizer,
    version,
)
from .hf_weights import Notebook, weights_digest

Pooling = Literal["mean", "cls"]
#: What sentence-transformers calls them.
_POOLINGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """A model in memory that makes vectors."""

    model: Any
    raw: Tokenizer
    device: torch.device
    pooling: Pooling
    context_length: int
    #: Inputs computed together: as many as cost the memory of `max_batch` whole contexts.
    batch_tokens: int

    def embed(self, request: EmbedRequest) -> Iterator[tuple[Sequence[int], Sequence[Embedding]]]:
        """The embeddings in groups, each with the places of its inputs in the request.

        Inputs of about one length go together, so that little is computed for nothing. Raises
        `RequestRejected`.
        """
        size = int(self.model.config.hidden_size)
        if request.dimensions not in (None, size):
            message = f"this model makes vectors of {size} numbers and no others"
            raise RequestRejected(message, field="dimensions")
        tokens = [self._tokens(number, given) for number, given in enumerate(request.inputs)]
        order = sorted(range(len(tokens)), key=lambda place: len(tokens[place]))
        while order:
            longest = len(tokens[order[-1]])
            count = max(1, self.batch_tokens // longest)
            places, order = order[-count:], order[:-count]
            yield places, self._compute([tokens[place] for place in places])

    def _tokens(self, number: int, given: Input) -> Sequence[int]:
        if isinstance(given, str):
            tokens: Sequence[int] = self.raw.encode(given).ids
        else:
            tokens = given
            if max(tokens) >= int(self.model.config.vocab_size):
                raise RequestRejected(f"input {number}: not a token of this model", field="input")
        if len(tokens) > self.context_length:
            raise ContextTooLong(
                f"input {number} has {len(tokens)} tokens; {self.context_length} is the most",
                field="input",
            )
        # A tokenizer without marks makes nothing of the empty text.
        return tokens or [self.model.config.pad_token_id or 0]

    @torch.inference_mode()
    def _compute(self, tokens: Sequence[Sequence[int]]) -> Sequence[Embedding]:
        longest = max(map(len, tokens))
        pad = self.model.config.pad_token_id or 0
        ids = torch.tensor([[*t, *[pad] * (longest - len(t))] for t in tokens], device=self.device)
        lengths = torch.tensor([len(t) for t in tokens], device=self.device)
        mask = torch.arange(longest, device=self.device)[None, :] < lengths[:, None]
        hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * mask[:, :, None]).sum(1) / lengths[:, None]
        vectors = torch.nn.functional.normalize(pooled, dim=1).cpu().numpy().astype("<f4")
        return [
            Embedding(vector=vector.tobytes(), usage=Usage(prompt_tokens=len(t)))
            for vector, t in zip(vectors, tokens, strict=True)
        ]


def start_embedder(order: Load, tell: Callable[[str], None]) -> tuple[Embedder, Loaded]:
    """Load a model. Raises `LoadError`; `tell` hears what is being done."""
    torch.set_num_threads(order.threads)
    source = find(order.model)
    device = choose_device(order.device)
    dtype = choose_dtype(order.dtype, device)
    tell("reading the tokenizer")
    tokenizer, raw = load_tokenizer(source)
    tell(f"loading the weights ({str(dtype).removeprefix('torch.')}, {device})")
    model = from_source(AutoModel, source, dtype=dtype).eval().to(device)
    folder = source if isinstance(source, Path) else hub_folder(source)
    weights = weights_digest(folder, Notebook(order.cache_dir), tell)
    own = int(getattr(model.config, "max_position_embeddings", None) or 512)
    context = min(own, int(tokenizer.model_max_length), order.max_context or own)
    embedder = Embedder(
        model=model,
        raw=raw,
        device=device,
        pooling=read_pooling(folder),
        context_length=context,
        batch_tokens=order.max_batch * context,
    )
    tell("trying it out")
    for _ in embedder.embed(EmbedRequest(model="", inputs=("hello",))):
        pass
    name = source.name if isinstance(source, Path) else source
    numbers = f"{str(dtype).removeprefix('torch.')}/{device.type}/{embedder.pooling}"
    offer = ModelOffer(
        id=name,
        tasks=("embed",),
        context_length=context,
        weights=weights,
        engine=f"transformers/{version('transformers')}+torch/{version('torch')}",
        numerics=f"{numbers}/batch-dependent",
    )
    about = f"{name}: vectors of {model.config.hidden_size} numbers, {numbers}"
    return embedder, Loaded(offer=offer, about=about)


def read_pooling(folder: Path) -> Pooling:
    """How a folder says that its model is pooled. Raises `LoadError` for a way not known here."""
    try:
        said = json.loads((folder / "1_Pooling" / "config.json").read_text())
    except FileNotFoundError:
        return "mean"
    except (OSError, ValueError) as error:
        raise LoadError(f"{folder}/1_Pooling/config.json cannot be read: {error}") from error
    wanted = [name for name, value in said.items() if name.startswith("pooling_mode_") and value]
    if len(wanted) == 1 and wanted[0] in _POOLINGS:
        return _POOLINGS[wanted[0]]
    raise LoadError(
        f"{folder.name} is pooled by {' and '.join(wanted) or 'nothing'}",
        "models that are pooled by the mean or by the first token can be used",
    )
