"""What a node tells its peers of a provider, and when."""

from dataclasses import dataclass

import trio
import trio.testing
from fakes_mesh import FakeProvider

from promptmesh.node.own_providers import LOOK_SOON, OwnProvider
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
