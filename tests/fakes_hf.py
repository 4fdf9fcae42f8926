"""A language model of a few kilobytes that says nothing sensible, and a loop to run a provider in.

The model is a real transformers model with random weights and a real byte-level tokenizer, so that
everything but the sense of its answers is as with a large one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio
import trio.testing

from promptmesh.providers.base import (
    CompletionBuilder,
    GenerateRequest,
    Message,
    Sampling,
    Text,
)
from promptmesh.providers.local_hf import LocalHF

T = TypeVar("T")

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ("<|end|>", "<|start|>")
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello world, hello there.",
    "user assistant system Once upon a time there was a small village by the sea.",
]
#: The end token's number.
END = 0


def make_tokenizer() -> Any:
    """A byte-level tokenizer that knows every byte and a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def make_tiny_model(folder: Path, *, context: int = 256, kind: str = "llama") -> Path:
    """Write a model into a folder. The same every time."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        MambaConfig,
        PreTrainedTokenizerFast,
    )

    raw = make_tokenizer()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = TEMPLATE
    sizes: dict[str, Any] = {
        "vocab_size": raw.get_vocab_size(),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "eos_token_id": END,
        "bos_token_id": None,
        "pad_token_id": END,
    }
    config: Any
    if kind == "mamba":
        config = MambaConfig(state_size=4, **sizes)
    else:
        config = LlamaConfig(
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=context,
            # Wide enough that one token is clearly the likeliest.
            initializer_range=0.3,
            **sizes,
        )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat(
    model: str, text: str, *, prefix: str = "", begun: int = 0, **sampling: Any
) -> GenerateRequest:
    """A request of one user message."""
    return GenerateRequest(
        model=model,
        messages=(Message(role="user", content=(Text(text=text),)),),
        sampling=Sampling(**sampling),
        prefix=prefix,
        begun=begun,
    )


async def read(provider: LocalHF, request: GenerateRequest) -> tuple[list[str], CompletionBuilder]:
    """The pieces of an answer, and the whole."""
    pieces, builder = [], CompletionBuilder()
    async with provider.open(request) as answering:
        async for chunk in answering.chunks:
            pieces.append(chunk.text)
            builder.add(chunk)
    return pieces, builder


def worker_environment_for_tests() -> dict[str, str]:
    """This process's environment, with one thread and no hub."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Hosted:
    """A provider that runs in a trio loop of its own thread, for tests that share it."""

    def __init__(self, provider: LocalHF, token: trio.lowlevel.TrioToken) -> None:
        self.provider = provider
        self._token = token

    def run(self, function: Callable[..., Awaitable[T]], *args: Any, patience: float = 240) -> T:
        """Run an async function in the loop; raises what it raises."""

        async def limited() -> T:
            with trio.fail_after(patience):
                return await function(*args)

        return trio.from_thread.run(limited, trio_token=self._token)

    def read(self, request: GenerateRequest) -> tuple[list[str], CompletionBuilder]:
        """The pieces of an answer, and the whole."""
        return self.run(read, self.provider, request)


@contextmanager
def hosted(provider: LocalHF) -> Iterator[Hosted]:
    """Run a provider until the block is left."""
    ready = threading.Event()
    loop: list[Any] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            loop.extend((trio.lowlevel.current_trio_token(), nursery.cancel_scope))
            nursery.start_soon(provider.run)
            # One round, so that it has started before a request comes.
            await trio.testing.wait_all_tasks_blocked()
            ready.set()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    try:
        assert ready.wait(60)
        yield Hosted(provider, loop[0])
    finally:
        trio.from_thread.run_sync(loop[1].cancel, trio_token=loop[0])
        thread.join(60)
        assert not thread.is_alive()
