"""This node's providers: built from the configuration, kept running, watched and advertised."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import uniform
from typing import TYPE_CHECKING, Any

import trio

from ..mesh.adverts import ProviderAdvert
from ..mesh.candidates import LocalBackend
from ..mesh.frames import Load
from ..mesh.policies import Allowance
from ..mesh.transport import PeerId
from ..providers.admission import Admission
from ..providers.base import Health, Priority
from ..providers.registry import Runs, build
from ..providers.slots import Waiting
from ..providers.throttle import Throttle
from ..providers.variables import VARIABLES, environment_of
from .config_providers import SUBSCRIPTION_KINDS, ProviderConfig
from .config_sections import Config
from .limiters import Limiters
from .pricing import Priced, Purse

if TYPE_CHECKING:
    # The stubs that come with libp2p know `trio` without it.
    from trio_typing import TaskStatus

logger = logging.getLogger(__name__)

#: What a provider without a bound of its own says it takes at once.
UNBOUNDED_SLOTS = 64
#: Requests at once, where the configuration says nothing.
DEFAULT_SLOTS: Mapping[str, int | None] = {
    "echo": None,
    "openai_compatible": 16,
    "openrouter": 16,
    # A process each takes 120 to 350 MB; the two that keep one process open take little more.
    "codex_cli": 4,
    "copilot_cli": 2,
    "copilot_sdk": 4,
    "gemini_cli": 2,
    "claude_code": 2,
}
#: The names of the models that this node runs itself.
LOCAL = ("local_hf", "local_hf_embed")
#: Kinds whose program unpacks itself, once for all its runs, into a folder that it is given.
UNPACK = frozenset({"copilot_cli", "copilot_sdk"})
#: Seconds between two looks at a provider: while it is not ready, and at most when it is.
LOOK_SOON, LOOK_LATER = 0.5, 5.0
#: `check` keeps to 2 s by its contract; one that does not is not ready.
CHECK_LIMIT = 4.0


#: The health of one that was not looked at yet.
NOT_SEEN = Health(state="starting", reason="it was not looked at yet")


@dataclass
class OwnProvider:
    """A provider of this node, with its slots and its health as last seen."""

    name: str
    kind: str
    admission: Admission
    shared: bool
    #: It spends somebody's money or subscription, where an offer has no price.
    paid: bool
    #: What has prices, and the money for it; None: it costs nothing that is known.
    priced: Priced | None = None
    allowance: Callable[[PeerId], Allowance] = lambda asker: Allowance()
    health: Health = NOT_SEEN
    #: Its state and models at the last look.
    _offered: tuple[str, tuple[str, ...]] = ("", ())

    def load(self, priority: Priority = "background") -> Load:
        """How busy it is to a request of that priority; to one in the background all counts."""
        load = self.admission.slots.load(priority)
        if load.limited:  # It takes no more now than what runs, whatever its slots are.
            running = max(load.running, 1)
            return Load(running=running, waiting=load.waiting, slots=running, wait=load.wait)
        return Load(
            running=load.running,
            waiting=load.waiting,
            slots=UNBOUNDED_SLOTS if load.slots is None else load.slots,
            wait=load.wait,
        )

    def backend(self) -> LocalBackend:
        """It as a candidate."""
        return LocalBackend(
            provider=self.priced or self.admission,
            name=self.name,
            kind=self.kind,
            shared=self.shared,
            load=self.load,
            paid=self.paid,
            available=lambda: self.health.state != "unavailable",
            allowance=self.allowance,
        )

    def advert(self) -> ProviderAdvert:
        """It as peers see it: what waits in the background, they would not wait for.

        While it is starting, a model that came since the last look is left out: the health of
        that look is older than the model, and peers ask nothing of who is starting. The next look
        tells both.
        """
        load = self.load("member")
        offers = (self.priced or self.admission).models()
        starting, known = self.health.state == "starting", self._offered[1]
        return ProviderAdvert(
            name=self.name,
            kind=self.kind,
            models=tuple(offer for offer in offers if not starting or offer.id in known),
            slots=load.slots,
            running=load.running,
            waiting=load.waiting,
            state=self.health.state,
            reason=self.health.reason[:500],
            ttft=self.admission.ttft,
            rate=self.admission.rate,
            paid=self.paid,
        )

    async def watch(self, changed: Callable[[], None]) -> None:
        """Keep its health fresh until cancelled; `changed` is called when what it offers does."""
        while True:
            health = await self._look()
            if health.state != self.health.state:
                log = logger.warning if health.state == "unavailable" else logger.info
                log("%s is %s", self.name, _sentence(health))
            self.health = health
            offered = (health.state, tuple(offer.id for offer in self.admission.models()))
            if offered != self._offered:
                self._offered = offered
                changed()
            # Spread, so that a node with many does not look at all of them in one moment.
            later = LOOK_LATER * uniform(0.5, 1.0)
            await trio.sleep(later if health.state == "ready" else LOOK_SOON)

    async def _look(self) -> Health:
        try:
            with trio.move_on_after(CHECK_LIMIT):
                return await self.admission.check()
        except Exception as error:  # of another package's: the log has it, and its health the kind
            if self.health.state != "unavailable":
                logger.exception("the check of %s failed", self.name)
            reason = f"its check failed with {type(error).__name__}; the log says more"
            return Health(state="unavailable", reason=reason)
        return Health(state="unavailable", reason=f"no answer within {CHECK_LIMIT:g} s")


def _sentence(health: Health) -> str:
    return "; ".join(part for part in (health.state, health.reason, health.hint) if part)


class OwnProviders:
    """All providers of this node."""

    def __init__(self, providers: Sequence[OwnProvider]) -> None:
        self._providers = list(providers)
        self._backends = [provider.backend() for provider in providers]
        #: Called when what any of them offers has changed.
        self.on_change: list[Callable[[], None]] = []
        #: Where they run; None: not yet.
        self._nursery: trio.Nursery | None = None

    def __iter__(self) -> Iterator[OwnProvider]:
        return iter(self._providers)

    def backends(self) -> Sequence[LocalBackend]:
        """They as candidates."""
        return self._backends

    def adverts(self) -> tuple[ProviderAdvert, ...]:
        """Those that peers may use, as peers see them."""
        return tuple(p.advert() for p in self._providers if p.shared)

    def busy(self) -> bool:
        """Might one that comes now have to wait for a slot?"""
        return not all(own.admission.slots.free for own in self._providers)

    def waiting(self, request_id: str) -> Waiting | None:
        """Where the request of that id stands in a queue; None: it waits for no slot here."""
        found = (own.admission.slots.waiting(request_id) for own in self._providers)
        return next((waiting for waiting in found if waiting), None)

    def urge(self, request_id: str, priority: Priority) -> None:
        """The request of that id, wherever it waits here, is so urgent at least."""
        for own in self._providers:
            own.admission.slots.urge(request_id, priority)

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run what needs running, and watch all, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            for own in self._providers:
                self._nursery.start_soon(self._run, own, trio.CancelScope())
            task_status.started()
            await trio.sleep_forever()

    @contextmanager
    def added(self, own: OwnProvider) -> Iterator[None]:
        """One more, while inside. What it answers then goes on to its end."""
        assert self._nursery is not None, "they run"
        scope, backend = trio.CancelScope(), own.backend()
        self._providers.append(own)
        self._backends.append(backend)
        self._nursery.start_soon(self._run, own, scope)
        try:
            yield
        finally:
            scope.cancel()
            self._providers.remove(own)
            self._backends.remove(backend)
            self._changed()

    async def _run(self, own: OwnProvider, scope: trio.CancelScope) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                if isinstance(own.admission.provider, Runs):
                    nursery.start_soon(_work, own.name, own.admission.provider)
                nursery.start_soon(own.watch, self._changed)

    def _changed(self) -> None:
        for tell in self.on_change:
            tell()


async def _work(name: str, provider: Runs) -> None:
    try:
        await provider.run()
    except Exception:  # It must not take the others along: who looks at the log sees it.
        logger.exception("%s failed, and works no more", name)


def build_providers(
    config: Config, environment: Mapping[str, str], folder: Path, purse: Purse
) -> OwnProviders:
    """The providers of a configuration. Raises `SettingsError` that names what is wrong.

    `environment` is what a model's own process is started with, and in part what the programs of
    vendors get; in `folder` may be kept what was found out of a model. `purse` pays.
    """
    found = []
    if config.local_hf.model:
        found.append(_local_hf(config, environment, folder))
    if config.local_hf.embedding_model:
        found.append(_local_hf_embed(config, environment, folder))
    limiters = Limiters(config.providers)
    found += [
        _configured(table, config, environment, folder, purse, limiters.of(table))
        for table in config.providers
    ]
    return OwnProviders(found)


def _configured(
    table: ProviderConfig,
    config: Config,
    environment: Mapping[str, str],
    folder: Path,
    purse: Purse,
    throttle: Throttle | None,
) -> OwnProvider:
    settings = dict(table.options)
    if table.kind in UNPACK:
        settings["cache_dir"] = str(folder)
    if table.kind in VARIABLES:
        settings["environment"] = environment_of(table.kind, environment)
    if table.api_key is not None:
        settings["api_key"] = table.api_key.reveal()
    provider = build(table.kind, table.name, settings)
    admission = Admission(
        provider,
        # One that goes by HTTP where there is a key says so itself.
        slots=table.slots or getattr(provider, "slots", DEFAULT_SLOTS.get(table.kind)),
        max_waiting=_either(table.max_waiting, config.limits.max_waiting),
        throttle=throttle,
    )
    has_price = table.price is not None or bool(table.prices)
    return OwnProvider(
        name=table.name,
        kind=table.kind,
        admission=admission,
        shared=table.share,
        paid=table.api_key is not None or table.kind in SUBSCRIPTION_KINDS,
        priced=Priced(admission, purse, table.price, table.prices) if has_price else None,
        allowance=purse.allowance,
    )


def _local_hf(config: Config, environment: Mapping[str, str], folder: Path) -> OwnProvider:
    local = config.local_hf
    special = {
        "model": local.model,
        "max_context": local.max_context,
        "memory": local.memory_fraction,
    }
    return _local("local_hf", special, local.max_batch, config, environment, folder)


def _local_hf_embed(config: Config, environment: Mapping[str, str], folder: Path) -> OwnProvider:
    """One request at a time: its inputs fill a batch by themselves."""
    special = {"model": config.local_hf.embedding_model, "task": "embed"}
    return _local("local_hf_embed", special, 1, config, environment, folder)


def _local(
    name: str,
    special: Mapping[str, Any],
    slots: int,
    config: Config,
    environment: Mapping[str, str],
    folder: Path,
) -> OwnProvider:
    local = config.local_hf
    max_waiting = _either(local.max_waiting, config.limits.max_waiting)
    settings: dict[str, Any] = {
        "device": local.device,
        "dtype": local.dtype,
        "threads": local.threads,
        "max_batch": local.max_batch,
        "max_waiting": max_waiting,
        "environment": dict(environment),
        "cache_dir": str(folder),
        **special,
    }
    return OwnProvider(
        name=name,
        kind="local_hf",
        admission=Admission(
            build("local_hf", name, settings),
            slots=slots,
            max_waiting=max_waiting,
        ),
        shared=local.share,
        paid=False,
    )


def _either(own: int | None, common: int) -> int:
    return common if own is None else own
