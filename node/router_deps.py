"""`RouterDeps`: what calls of the Python API share, and may be given from outside in part.

Each owns one background thread with a trio loop (`loop_thread`), in which providers, connections,
a model's process and the cache live. It begins with the first call and ends with `close`, or the
program.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .seed_ask import PROVIDER, RESPONSE
from .seed_call import make_manager

if TYPE_CHECKING:
    from .config_sections import Config
    from .loop_thread import Job, LoopThread
    from .seed_engine import Engine

T = TypeVar("T")
logger = logging.getLogger(__name__)

#: Entries of a `RouterCache`.
MAX_ENTRIES = 4096


class RouterCache(MutableMapping[str, Any]):
    """Named things, of which those used longest ago are forgotten. Any thread may use it."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._lock = threading.RLock()
        self._entries: OrderedDict[str, Any] = OrderedDict()

    def __getitem__(self, key: str) -> Any:
        with self._lock:
            value = self._entries[key]
            self._entries.move_to_end(key)
            return value

    def __setitem__(self, key: str, value: Any) -> None:
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            if len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)

    def __delitem__(self, key: str) -> None:
        with self._lock:
            del self._entries[key]

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def renew_lock(self) -> None:
        """In a forked child: another thread of the parent may have held it."""
        self._lock = threading.RLock()


class RouterDeps:
    """Shared by the calls that it is given to; without one they share the default one.

    - `router_cache`: provider objects by `llm_provider::NAME`, and the CID of each stored answer by
      `llm_response::KEY`. Any mutable mapping; yours may hold what you like beside it.
    - `remote_cache`: an object with `get(key)` and `set(key, value)` that is asked for a text where
      the node's own cache has none, and told each new one. It may block; a fault of it is a miss.
    - `backend_manager`: what `provider="backend_manager"` asks: one of `get_backend_manager()`, or
      any object with `generate(prompt, *, model_name=None, **kwargs)`.
    - `accelerate_managers`, `ipfs_backend`: carried for programs that keep their own here.
    """

    def __init__(
        self,
        *,
        accelerate_managers: dict[str, Any] | None = None,
        backend_manager: Any = None,
        ipfs_backend: Any = None,
        router_cache: MutableMapping[str, Any] | None = None,
        remote_cache: Any = None,
        home: str | Path | None = None,
    ) -> None:
        """`home` is the node's folder; None: as for the command line. Opens and starts nothing."""
        self.accelerate_managers = {} if accelerate_managers is None else accelerate_managers
        self.backend_manager = backend_manager
        self.ipfs_backend = ipfs_backend
        self.router_cache = RouterCache() if router_cache is None else router_cache
        self.remote_cache = remote_cache
        #: Answers that were stored before are not used (Unix time).
        self.not_before = 0.0
        self._home = home
        self._lock = threading.RLock()
        #: Held while the thing of that name is made.
        self._making: dict[str, threading.RLock] = {}
        self._thread: LoopThread[Engine] | None = None
        self._abandons: weakref.finalize[..., Any] | None = None
        self._config: Config | None = None
        _all.add(self)

    def __enter__(self) -> RouterDeps:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what is shared by name

    def get_cached(self, key: str) -> Any:
        """What is kept under that name; None if nothing is."""
        return self.router_cache.get(key)

    def set_cached(self, key: str, value: Any) -> Any:
        """Keep it, and give it back."""
        if key:
            self.router_cache[key] = value
        return value

    def get_cached_or_remote(self, key: str) -> Any:
        """The same, with the `remote_cache` asked for what is not here. A fault of it is a miss."""
        value = self.get_cached(key)
        if value is None and self.remote_cache is not None and key:
            value = self._remote(self.remote_cache.get, key)
            if value is not None:
                self.set_cached(key, value)
        return value

    def set_cached_and_remote(self, key: str, value: Any) -> Any:
        """Keep it here and in the `remote_cache`, and give it back."""
        self.set_cached(key, value)
        if self.remote_cache is not None and key:
            self._remote(self.remote_cache.set, key, value)
        return value

    def get_or_create(self, key: str, factory: Callable[[], Any]) -> Any:
        """What is kept under that name, made if there is nothing; made once for all threads."""
        if not key:
            return factory()
        found = self.router_cache.get(key)
        if found is not None:
            return found
        with self._lock:
            making = self._making.setdefault(key, threading.RLock())
        with making:
            found = self.router_cache.get(key)
            if found is None:
                found = self.set_cached(key, factory())
        # Only now: whoever comes after a failure waits for the same as those who wait already.
        with self._lock:
            self._making.pop(key, None)
        return found

    def _remote(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:  # Whatever it raises is a miss; who looks at the log sees it.
            logger.warning("the remote cache failed: %s: %s", type(error).__name__, error)
            return None

    # --- managers

    def get_backend_manager(
        self,
        *,
        purpose: str = "router",
        enable_health_checks: bool = True,
        load_balancing_strategy: str | None = None,
    ) -> Any:
        """The `backend_manager`, one of `get_backend_manager()` if there is none yet."""
        with self._lock:
            if self.backend_manager is None:
                self.backend_manager = make_manager(
                    lambda: self, load_balancing_strategy, enable_health_checks
                )
            return self.backend_manager

    def get_accelerate_manager(self, *, purpose: str = "router", **_: Any) -> Any:
        """What `accelerate_managers` has for that purpose; None: nothing. None is made here."""
        return self.accelerate_managers.get(purpose.strip() or "router")

    # --- the thread

    def close(self) -> None:
        """Cancel what runs, end the models' processes and the thread. A later call begins anew."""
        with self._lock:
            thread, self._thread, self._config = self._thread, None, None
            if self._abandons is not None:
                self._abandons.detach()
        if thread is not None:
            thread.close()

    def clear(self) -> None:
        """Forget what was built, and use no answer that is stored already."""
        from .seed_engine import Engine

        for key in list(self.router_cache):
            if isinstance(key, str) and key.startswith((PROVIDER, RESPONSE)):
                with suppress(KeyError):  # another thread forgot it first
                    del self.router_cache[key]
        self.not_before = time.time()
        with self._lock:
            if self._thread is None or not self._thread.running:
                return
            job = self._thread.submit(Engine.clear)
        job.future.result()

    @property
    def home(self) -> Path:
        """The node's folder."""
        from .config import home_path

        return home_path(str(self._home) if self._home is not None else None)

    def config(self) -> Config:
        """The node's configuration, read once. Raises `ConfigError`."""
        from .config import library_config

        with self._lock:
            if self._config is None:
                self._config = library_config(self.home)
            return self._config

    def submit(self, work: Callable[[Engine], Awaitable[T]]) -> Job[T]:
        """Begin work in the thread, which is begun with it if need be. Raises `ConfigError`."""
        with self._lock:  # `close` comes before or after, not between
            if self._thread is None:
                self._thread = self._make_thread()
            return self._thread.submit(work)

    def _make_thread(self) -> LoopThread[Engine]:
        from .home import Home
        from .loop_thread import LoopThread
        from .seed_engine import Engine
        from .seed_opening import open_engine

        config, home = self.config(), Home(self.home)
        thread = LoopThread(lambda: open_engine(config, home), "promptmesh", apart=Engine.apart)
        self._abandons = weakref.finalize(self, LoopThread.abandon, thread)
        # At the end of the program the threads are closed, which waits for them.
        self._abandons.atexit = False
        return thread

    def _renew_locks(self) -> None:
        """In a forked child: another thread of the parent may have held them."""
        self._lock, self._making = threading.RLock(), {}
        if isinstance(self.router_cache, RouterCache):
            self.router_cache.renew_lock()


_all: weakref.WeakSet[RouterDeps] = weakref.WeakSet()
_default: RouterDeps | None = None
_default_lock = threading.Lock()


def get_default_router_deps() -> RouterDeps:
    """Those of calls that name none."""
    global _default
    with _default_lock:
        if _default is None:
            _default = RouterDeps()
        return _default


def set_default_router_deps(deps: RouterDeps | None) -> None:
    """Use these from now on; None: new ones. Those before are not closed."""
    global _default
    with _default_lock:
        _default = deps


def _renew_locks() -> None:
    global _default_lock
    _default_lock = threading.Lock()
    for deps in list(_all):
        deps._renew_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
