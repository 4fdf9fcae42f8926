"""Providers as `/mesh/v1/*` and `--json` show them."""

from __future__ import annotations

from typing import Any

from ..mesh.adverts import ProviderAdvert
from .own_providers import OwnProvider


def own_row(own: OwnProvider) -> dict[str, Any]:
    """One of this node's own."""
    load = own.load()  # all that there is, and not as peers see it
    fields = advert_row(own.advert())
    fields |= {"running": load.running, "waiting": load.waiting, "wait_s": load.wait}
    fields |= {"reason": own.health.reason, "hint": own.health.hint, "share": own.shared}
    fields["paid"] = own.paid
    stats = getattr(own.admission.provider, "stats", None)
    if callable(stats):
        fields["stats"] = stats()
    return fields


def advert_row(advert: ProviderAdvert) -> dict[str, Any]:
    """One as its node tells of it."""
    return {
        "name": advert.name,
        "kind": advert.kind,
        "models": [offer.id for offer in advert.models],
        "slots": advert.slots,
        "running": advert.running,
        "waiting": advert.waiting,
        "state": advert.state,
        "reason": advert.reason,
        "ttft_s": advert.ttft,
        "tokens_per_s": advert.rate,
        "offers": advert.models,
    }
