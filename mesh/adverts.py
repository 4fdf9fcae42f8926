"""What a node says of itself, and its bytes. Pure.

An advert travels signed, so that others may pass it on (a peer that has just connected asks for the
table), but nobody can refresh or change it but its subject.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import msgspec

from ..providers.base import ModelOffer, Value
from .frames import Load, RemoteProtocolError, decode_value, encode_value
from .transport import PeerId

#: The version of the advert's form.
VERSION = 1
#: Bytes of an advert: with its signature it fits into one gossip message, which may have 64 KiB.
MAX_ADVERT = 60 * 1024
#: Seconds that an advert may live unrefreshed.
MIN_TTL, MAX_TTL = 5.0, 600.0
#: What is signed begins with this, so that no other signed bytes pass for an advert.
CONTEXT = b"promptmesh advert 1\0"
#: Addresses, graphics cards, providers, and models of a provider that an advert may name.
MAX_ADDRESSES, MAX_GPUS, MAX_PROVIDERS, MAX_MODELS = 32, 64, 64, 1024
#: Providers that are named to a person.
MOST_NAMED = 5

#: Names end in terminals and in HTTP headers, so they hold no control characters.
PRINTABLE = "^[^\\x00-\\x1f\\x7f]*$"
Name = Annotated[str, msgspec.Meta(max_length=200, pattern=PRINTABLE)]
Line = Annotated[str, msgspec.Meta(max_length=500, pattern=PRINTABLE)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Slots = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Positive = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class Gpu(Value, frozen=True, kw_only=True):
    """A graphics card; memory in bytes, `utilisation` from 0 to 1."""

    index: Count
    name: Name
    memory_total: Count
    memory_free: Count
    utilisation: Positive = 0.0


class Machine(Value, frozen=True, kw_only=True):
    """What a node runs on; memory in bytes. `cpus` is None where it is not known."""

    cpus: Count | None = None
    memory_total: Count = 0
    memory_free: Count = 0
    gpus: Annotated[tuple[Gpu, ...], msgspec.Meta(max_length=MAX_GPUS)] = ()


class ProviderAdvert(Value, frozen=True, kw_only=True):
    """A provider that peers may use, as its node sees it.

    `ttft` (s to the first token) and `rate` (tokens/s) are measured there; None: not yet.
    """

    name: Name
    kind: Name = ""
    models: Annotated[tuple[ModelOffer, ...], msgspec.Meta(max_length=MAX_MODELS)] = ()
    slots: Slots = 1
    running: Count = 0
    waiting: Count = 0
    state: Literal["ready", "starting", "unavailable"] = "ready"
    reason: Line = ""
    ttft: Positive | None = None
    rate: Positive | None = None
    #: It spends somebody's money or subscription.
    paid: bool = False

    @property
    def load(self) -> Load:
        return Load(running=self.running, waiting=self.waiting, slots=self.slots)


class Advert(Value, frozen=True, kw_only=True):
    """What a node says of itself. `epoch` rises with each start, `seq` with each advert."""

    v: int = VERSION
    peer: Name = ""
    node: Name = ""
    version: Name = ""
    epoch: Count = 0
    seq: Count = 0
    #: Seconds after receipt for which it holds.
    ttl: Positive = MIN_TTL
    addresses: Annotated[tuple[Line, ...], msgspec.Meta(max_length=MAX_ADDRESSES)] = ()
    machine: Machine = Machine()
    providers: Annotated[tuple[ProviderAdvert, ...], msgspec.Meta(max_length=MAX_PROVIDERS)] = ()
    #: The node goes; it offers nothing any more.
    leaving: bool = False

    @property
    def stamp(self) -> tuple[int, int]:
        """Orders the adverts of one node."""
        return self.epoch, self.seq


class SignedAdvert(Value, frozen=True, kw_only=True):
    """An advert's bytes with its subject's signature. `age` (s) says who passes it on."""

    advert: Annotated[bytes, msgspec.Meta(max_length=MAX_ADVERT)]
    signature: Annotated[bytes, msgspec.Meta(max_length=128)]
    age: Positive = 0.0


def seal(advert: Advert, sign: Callable[[bytes], bytes]) -> SignedAdvert:
    """The advert, signed. Raises `ValueError` if peers would refuse it (see `fitting`)."""
    data = encode_value(advert)
    try:
        decode_value(data, Advert, limit=MAX_ADVERT)
    except RemoteProtocolError as error:
        raise ValueError(f"peers would refuse this node's advert: {error}") from None
    return SignedAdvert(advert=data, signature=sign(CONTEXT + data))


def fitting(advert: Advert) -> tuple[Advert, Sequence[str]]:
    """As much of the advert as peers take, and what is left out of it: the last of each list."""
    providers = [_within_limits(p) for p in advert.providers[:MAX_PROVIDERS]]
    machine = msgspec.structs.replace(advert.machine, gpus=advert.machine.gpus[:MAX_GPUS])
    fit = msgspec.structs.replace(
        advert,
        addresses=advert.addresses[:MAX_ADDRESSES],
        machine=machine,
        providers=tuple(providers),
    )
    while len(encode_value(fit)) > MAX_ADVERT and any(p.models for p in fit.providers):
        fit = _with_fewer_models(fit)
    return fit, list(_left_out(advert, fit))


def _within_limits(provider: ProviderAdvert) -> ProviderAdvert:
    reason = "".join(c if c.isprintable() else " " for c in provider.reason[:500])
    models = provider.models[:MAX_MODELS]
    return msgspec.structs.replace(provider, models=models, reason=reason)


def _with_fewer_models(advert: Advert) -> Advert:
    largest = max(advert.providers, key=lambda p: len(p.models))
    kept = msgspec.structs.replace(largest, models=largest.models[: len(largest.models) // 2])
    providers = tuple(kept if p is largest else p for p in advert.providers)
    return msgspec.structs.replace(advert, providers=providers)


def _left_out(advert: Advert, fit: Advert) -> Iterator[str]:
    if lost := advert.providers[len(fit.providers) :]:
        yield f"{len(lost)} providers ({', '.join(p.name for p in lost[:MOST_NAMED])})"
    for whole, kept in zip(advert.providers, fit.providers, strict=False):
        if count := len(whole.models) - len(kept.models):
            yield f"{count} of the {len(whole.models)} models of {whole.name}"
    if count := len(advert.addresses) - len(fit.addresses):
        yield f"{count} addresses"
    if count := len(advert.machine.gpus) - len(fit.machine.gpus):
        yield f"{count} graphics cards"


def open_sealed(data: bytes) -> tuple[SignedAdvert, Advert]:
    """An advert as it came, not yet trusted. Raises `RemoteProtocolError`."""
    sealed = decode_value(data, SignedAdvert, limit=MAX_ADVERT + 1024)
    return sealed, decode_value(sealed.advert, Advert, limit=MAX_ADVERT)


def is_signed(
    sealed: SignedAdvert, subject: PeerId, verify: Callable[[PeerId, bytes, bytes], bool]
) -> bool:
    """Did its subject sign it?"""
    return verify(subject, CONTEXT + sealed.advert, sealed.signature)
