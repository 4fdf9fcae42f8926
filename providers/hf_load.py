"""Loads a transformers model: which device, which numbers, how much memory, and why it failed."""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from huggingface_hub import constants as hub
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from .hf_frames import Load
from .hf_tools import asks_for_tool_calls
from .hf_weights import Notebook, weights_digest

logger = logging.getLogger(__name__)

#: Share of the free memory that the cache of keys and values gets if nothing is said. An
#: accelerator is there for the model; the memory of the computer is also other programs'.
SHARE = {"cuda": 0.6, "cpu": 0.25}
#: Tokens of cache for each request that may run at once, if nothing is said. The whole context is
#: always reserved for one, where the memory allows.
TOKENS_EACH = {"cuda": 4096, "cpu": 512}
#: Tokens a page of the cache holds. Prompts share whole pages: small ones share more.
PAGE = 32


class LoadError(Exception):
    """The model cannot be had. `hint` is the next step for a person."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


class OwnSampling(NamedTuple):
    """What holds where a request leaves it open: what the model's makers recommend
    (`generation_config.json`), else the likeliest token, as transformers itself does."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in memory with its tokenizer, and what is known of it."""

    id: str
    model: Any
    tokenizer: Any
    #: The tokenizer below transformers' own: it is not changed by use, so threads may share it.
    raw: Tokenizer
    device: str
    dtype: str
    #: Tokens of a prompt with its answer, and tokens the cache holds for all requests together.
    context_length: int
    cache_tokens: int
    #: Each of these ends an answer.
    ends: frozenset[int]
    sampling: OwnSampling
    vocabulary: int
    #: Characters of the longest token.
    longest_token: int
    tools: bool
    weights: str
    engine: str

    @property
    def attention(self) -> str:
        """Name of the attention implementation."""
        return str(self.model.config._attn_implementation)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Tokens of a text; `special` adds those that the tokenizer puts around one."""
        return list(self.raw.encode(text, add_special_tokens=special).ids)


def load(order: Load, notebook: Notebook, tell: Callable[[str], None]) -> LoadedModel:
    """Load a model. Raises `LoadError`; `tell` hears what is being done."""
    torch.set_num_threads(order.threads)
    source = find(order.model)
    device = choose_device(order.device)
    dtype = choose_dtype(order.dtype, device)
    name = source.name if isinstance(source, Path) else source
    tell("reading the tokenizer")
    tokenizer, raw = load_tokenizer(source)
    tell(f"loading the weights ({str(dtype).removeprefix('torch.')}, {device})")
    model = load_weights(source, dtype, device)
    folder = source if isinstance(source, Path) else hub_folder(source)
    weights = weights_digest(folder, notebook, tell)
    config = model.config.get_text_config()
    context = context_length(config, order.max_context)
    cache = cache_tokens(config, dtype, device, context, order)
    vocabulary = raw.get_vocab()
    return LoadedModel(
        id=name,
        model=model,
        tokenizer=tokenizer,
        raw=raw,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        context_length=min(context, cache),
        cache_tokens=cache,
        ends=end_tokens(model, tokenizer),
        sampling=own_sampling(model.generation_config),
        vocabulary=int(config.vocab_size),
        longest_token=max(map(len, vocabulary)),
        tools=asks_for_tool_calls(tokenizer.chat_template),
        weights=weights,
        engine=f"transformers/{version('transformers')}+torch/{version('torch')}",
    )


def version(package: str) -> str:
    """A package's version without its build ("+cpu"), which is in the numerics class."""
    return importlib.metadata.version(package).partition("+")[0]


# --- where it is --------------------------------------------------------------------------------


def find(model: str) -> Path | str:
    """A model's folder, or its id at the hub. Raises `LoadError` for a folder that is not there."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadError(
                f"{path} is no model folder: it has no config.json",
                "give the folder that holds config.json and the weights",
            )
        return path.resolve()
    # A hub id is a name, or an owner and a name.
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise LoadError(
            f"there is no model folder {path}",
            "scripts/get-model makes one with a small model; or give a model id of the hub",
        )
    return model


def hub_folder(model: str) -> Path:
    """Where the files of a hub model lie that were just loaded."""
    return Path(hf_hub_download(model, "config.json", local_files_only=True)).parent


def load_tokenizer(source: Path | str) -> tuple[Any, Tokenizer]:
    """transformers' tokenizer and the one it stands on."""
    tokenizer = from_source(AutoTokenizer, source)
    raw = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(raw, Tokenizer):
        raise LoadError(f"the tokenizer of {source} has no fast form (tokenizer.json)")
    # Some files ask for these; a prompt must be neither cut nor filled up.
    raw.no_truncation()
    raw.no_padding()
    return tokenizer, raw


def load_weights(source: Path | str, dtype: torch.dtype, device: torch.device) -> Any:
    """The model, on its device."""
    placed = {"device_map": {"": device}} if device.type != "cpu" else {}
    try:
        return from_source(AutoModelForCausalLM, source, dtype=dtype, **placed).eval()
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise LoadError(
            f"the weights of {source} do not fit into the memory of {device}",
            "take a smaller model, or dtype = 'bfloat16'",
        ) from error


def from_source(kind: Any, source: Path | str, **options: Any) -> Any:
    """`from_pretrained` with its errors told as a person needs them."""
    try:
        return kind.from_pretrained(str(source), **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise LoadError(f"{source} needs a package: {error}", "install it and try again") from error
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(f"{source}: {first_line(error)}", hint_for(source)) from error


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def hint_for(source: Path | str) -> str:
    if isinstance(source, Path):
        return "is it a whole transformers model? Download or unpack it again"
    if hub.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and the model is not in the cache: unset it, or give a folder"
    return "is the model id right, and can this machine reach the hub? A folder works without one"


# --- on what ------------------------------------------------------------------------------------


def choose_device(wish: str) -> torch.device:
    """`auto`: the first CUDA device, else the CPU. Raises `LoadError` for one that is not there."""
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wish)
    except RuntimeError as error:
        raise LoadError(f"{wish!r} is no device", "auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LoadError(
            f"there is no device {wish}: torch sees {torch.cuda.device_count()} CUDA devices",
            "device = 'auto' takes what is there",
        )
    if device.type not in SHARE:
        raise LoadError(f"device {wish!r} is not supported", "auto, cpu, cuda or cuda:1")
    return device


def choose_dtype(wish: str, device: torch.device) -> torch.dtype:
    """`auto`: float32 on a CPU, where it makes a batch repeatable; bfloat16 on CUDA, or float16
    where the card is too old for it."""
    if wish == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    dtype = getattr(torch, wish, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise LoadError(f"{wish!r} is no dtype", "auto, float32, bfloat16 or float16")
    return dtype


# --- how much -----------------------------------------------------------------------------------


def context_length(config: Any, cap: int | None) -> int:
    """Tokens of a prompt with its answer, by the model's own configuration and the setting."""
    own = getattr(config, "max_position_embeddings", None) or 2048
    return min(int(own), cap) if cap else int(own)


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of cache for one token: a key and a value for each head of each layer. A model without
    attention has a state of one size, however long the text: counted as a byte."""
    all_heads = getattr(config, "num_attention_heads", None)
    if not all_heads:
        return 1
    heads = getattr(config, "num_key_value_heads", None) or all_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // all_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(size) * dtype.itemsize


def cache_tokens(
    config: Any, dtype: torch.dtype, device: torch.device, context: int, order: Load
) -> int:
    """Tokens the cache holds, in whole pages. Raises `LoadError` where there is room for none."""
    each = bytes_per_token(config, dtype)
    free = free_memory(device)
    if order.memory is None:
        wanted = max(context, order.max_batch * TOKENS_EACH[device.type])
        room = int(free * SHARE[device.type])
    else:
        # Up to 1 it is a share of what is free, above that a number of bytes.
        wanted = order.max_batch * context
        room = int(free * order.memory) if order.memory <= 1 else int(order.memory)
    pages = min(math.ceil(wanted / PAGE), room // (each * PAGE))
    if pages < 1:
        raise LoadError(
            f"{room // 2**20} MB of memory hold no cache for a model of {each} bytes a token",
            "give more by `memory`, or take a smaller model",
        )
    if pages * PAGE < context:
        logger.warning(
            "memory for %d tokens only: prompt and answer may not be longer (the model: %d)",
            pages * PAGE,
            context,
        )
    return pages * PAGE


def free_memory(device: torch.device) -> int:
    """Bytes that nobody uses."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


# --- what it says of itself ---------------------------------------------------------------------


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer, by the model's and the tokenizer's configuration."""
    ends: set[int] = set()
    for value in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        if isinstance(value, int):
            ends.add(value)
        elif value is not None:
            ends.update(int(token) for token in value)
    return frozenset(ends)


def own_sampling(config: Any) -> OwnSampling:
    """What the model's makers recommend, if they recommend sampling."""
    if not getattr(config, "do_sample", False):
        return OwnSampling()
    default = OwnSampling(1.0, 1.0, 0)
    return OwnSampling(
        temperature=default.temperature if config.temperature is None else config.temperature,
        top_p=default.top_p if config.top_p is None else config.top_p,
        top_k=default.top_k if config.top_k is None else config.top_k,
    )
