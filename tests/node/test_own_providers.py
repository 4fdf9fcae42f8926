"""What a node tells its peers of a provider, and when, and what a faulty one costs it."""

from dataclasses import dataclass

import pytest
import trio
import trio.testing
from fakes_mesh import FakeProvider

from promptmesh.node.own_providers import LOOK_LATER, LOOK_SOON, OwnProvider, OwnProviders
from promptmesh.providers.admission import Admission
from promptmesh.providers.base import Health, ModelOffer

#: A test names the clock itself: it works only for who does.
Clock = trio.testing.MockClock


@dataclass
class Loading(FakeProvider):
    """Offers its model from the moment on at which that is loaded."""

    offers: tuple[ModelOffer, ...] = ()

    async def check(self) -> Health:
        return Health() if self.offers else Health(state="starting", reason="loading m")


async def test_a_model_is_never_told_of_with_the_health_of_before_it_came(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    provider = Loading()
    own = OwnProvider("hf", "local_hf", Admission(provider, slots=1), shared=True, paid=False)
    told: list[tuple[str, int]] = []

    def tell() -> None:
        told.append((own.advert().state, len(own.advert().models)))

    nursery.start_soon(own.watch, tell)
    await trio.sleep(LOOK_SOON / 2)
    provider.offers = (ModelOffer(id="m"),)
    tell()  # as it happens now and then
    await trio.sleep(LOOK_SOON)
    assert told == [("starting", 0), ("starting", 0), ("ready", 1)]
    provider.offers += (ModelOffer(id="n"),)
    assert len(own.advert().models) == 2  # what is ready may well have more


@dataclass
class Faulty(FakeProvider):
    """One of another package: its own work ends at once, and its first looks, in faults."""

    looks: int = 0

    async def check(self) -> Health:
        self.looks += 1
        if self.looks <= 3:
            raise ZeroDivisionError(f"look {self.looks}")
        return Health()

    async def run(self) -> None:
        raise ZeroDivisionError("work")


async def test_a_faulty_provider_costs_nobody_else_anything(
    autojump_clock: Clock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    faulty, sound = (
        OwnProvider(name, "x", Admission(provider, slots=1), shared=True, paid=False)
        for name, provider in (("faulty", Faulty()), ("sound", FakeProvider()))
    )
    await nursery.start(OwnProviders([faulty, sound]).run)
    await trio.sleep(LOOK_SOON / 2)
    assert (faulty.health.state, sound.health.state) == ("unavailable", "ready")
    assert "ZeroDivisionError" in faulty.health.reason
    await trio.sleep(LOOK_LATER)
    assert (faulty.health.state, sound.health.state) == ("ready", "ready")
    assert caplog.text.count("ZeroDivisionError: work") == 1
    assert caplog.text.count("ZeroDivisionError: look") == 1
    assert caplog.text.count("unavailable") == 1
