"""The settings of `local_hf`."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from .base import Task


class LocalHFSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Which model, and how it runs. Only `model` must be given."""

    #: A folder with a transformers model, or an id of the hub.
    model: str
    name: str = "local_hf"
    #: What the model is for.
    task: Task = "generate"
    #: `auto` (the first CUDA device, else the CPU), `cpu`, `cuda`, `cuda:1`.
    device: str = "auto"
    #: `auto` (float32 on a CPU; bfloat16 on CUDA, float16 on old cards), or a dtype of torch.
    dtype: str = "auto"
    #: Threads of computation on a CPU. None: one for each processor, or OMP_NUM_THREADS.
    threads: int | None = None
    #: Requests that run at once, and those that may wait for them.
    max_batch: int = 16
    max_waiting: int = 64
    #: Caps the tokens of a prompt with its answer. None: what the model and the memory allow.
    max_context: int | None = None
    #: For the cache of keys and values: up to 1 a share of the free memory, above it bytes. None:
    #: for one whole context or for `max_batch` short ones, at most a quarter of the free memory on
    #: a CPU and 0.6 of it on CUDA.
    memory: int | float | None = None
    #: Seconds of loading without a sign of progress until it is given up.
    load_timeout: float = 300.0
    #: Seconds a request waits for a model that is loading or starting again.
    start_wait: float = 60.0
    #: Folder for a small file with digests and measurements that take long. None: found out anew.
    cache_dir: str | None = None
    #: The environment of the process; what looks like a key of another service is left out of it.
    environment: dict[str, str] = {}

    @property
    def model_id(self) -> str:
        """What the model is called in requests: the folder's own name, or the id."""
        path = Path(self.model).expanduser()
        return path.resolve().name if path.is_dir() else self.model

    @property
    def effective_threads(self) -> int:
        """Threads of computation."""
        if self.threads is not None:
            return max(1, self.threads)
        said = self.environment.get("OMP_NUM_THREADS", "")
        if said.isdecimal() and 0 < int(said) <= 1024:
            return int(said)
        if hasattr(os, "sched_getaffinity"):
            return max(1, len(os.sched_getaffinity(0)))
        return os.cpu_count() or 1

    def __repr__(self) -> str:
        """Without the environment, which may hold a token."""
        return f"LocalHFSettings(name={self.name!r}, model={self.model!r})"
