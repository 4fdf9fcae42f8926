"""What a node says of itself, and what of it peers take."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.mesh.adverts import (
    MAX_ADDRESSES,
    MAX_ADVERT,
    MAX_GPUS,
    MAX_MODELS,
    MAX_PROVIDERS,
    Advert,
    Gpu,
    Machine,
    ProviderAdvert,
    SignedAdvert,
    fitting,
    is_signed,
    open_sealed,
    seal,
)
from promptmesh.mesh.frames import RemoteProtocolError, encode_value
from promptmesh.providers.base import ModelOffer


def sign(data: bytes) -> bytes:
    return b"signed:" + bytes([sum(data) % 256])


def verify(peer: str, data: bytes, signature: bytes) -> bool:
    return signature == sign(data)


def offering(peer: str, *models: str, **fields: Any) -> Advert:
    provider = ProviderAdvert(name="echo", models=tuple(ModelOffer(id=m) for m in models))
    plain = Advert(peer=peer, node=peer.upper(), epoch=1, seq=1, ttl=20.0, providers=(provider,))
    return msgspec.structs.replace(plain, **fields)


def test_a_sealed_advert_comes_back_and_a_changed_one_does_not_verify() -> None:
    gpu = Gpu(index=0, name="H100", memory_total=80, memory_free=70, utilisation=0.5)
    advert = offering("b", "m", machine=Machine(cpus=8, gpus=(gpu,)), addresses=("/ip4/1.1.1.1",))
    sealed, back = open_sealed(encode_value(seal(advert, sign)))
    assert back == advert
    assert is_signed(sealed, "b", verify)
    changed = msgspec.structs.replace(sealed, advert=sealed.advert + b"\1")
    assert not is_signed(changed, "b", verify)


def test_other_signed_bytes_are_no_advert() -> None:
    advert = encode_value(offering("b"))
    assert not is_signed(SignedAdvert(advert=advert, signature=sign(advert)), "b", verify)


def test_models_that_do_not_fit_are_left_out_and_told() -> None:
    many = [f"a-rather-long-vendor/model-with-a-long-name-{i}" for i in range(2000)]
    providers = (
        ProviderAdvert(name="big", models=tuple(ModelOffer(id=m, engine="x" * 90) for m in many)),
        ProviderAdvert(name="small", models=(ModelOffer(id="mine"),)),
    )
    fit, left_out = fitting(offering("b", providers=providers))
    sealed = seal(fit, sign)
    assert len(sealed.advert) <= MAX_ADVERT
    _, advert = open_sealed(encode_value(sealed))
    big, small = advert.providers
    assert [m.id for m in big.models] == many[: len(big.models)]
    assert 100 < len(big.models) < MAX_MODELS
    assert len(small.models) == 1
    assert left_out == [f"{2000 - len(big.models)} of the 2000 models of big"]


def test_what_is_beyond_a_bound_is_left_out_and_told() -> None:
    gpus = tuple(Gpu(index=i, name="g", memory_total=1, memory_free=1) for i in range(MAX_GPUS + 2))
    models = tuple(ModelOffer(id=str(i)) for i in range(MAX_MODELS + 3))
    names = [f"p{i}" for i in range(MAX_PROVIDERS + 7)]
    advert = offering(
        "b",
        providers=tuple(ProviderAdvert(name=n, models=models if n == "p1" else ()) for n in names),
        machine=Machine(gpus=gpus),
        addresses=("x",) * (MAX_ADDRESSES + 1),
    )
    fit, left_out = fitting(advert)
    _, back = open_sealed(encode_value(seal(fit, sign)))
    assert [p.name for p in back.providers] == names[:MAX_PROVIDERS]
    assert left_out == [
        "7 providers (p64, p65, p66, p67, p68)",
        f"3 of the {MAX_MODELS + 3} models of p1",
        "1 addresses",
        "2 graphics cards",
    ]


def test_a_reason_of_several_lines_goes_out_as_one() -> None:
    unwell = ProviderAdvert(
        name="p", state="unavailable", reason="it failed:\n\x1b[31mred" + "x" * 600
    )
    fit, left_out = fitting(offering("b", providers=(unwell,)))
    _, back = open_sealed(encode_value(seal(fit, sign)))
    assert back.providers[0].reason.startswith("it failed:  [31mred")
    assert not left_out


def test_what_fits_stays_as_it_is() -> None:
    advert = offering("b", "m", "n", addresses=("x",))
    assert fitting(advert) == (advert, [])


@pytest.mark.parametrize(
    "fields",
    [
        {"node": "x" * 201},
        {"node": "a\x1b[31mred"},
        {"node": "a\nb"},
        {"addresses": ("x" * 501,)},
        {"addresses": ("x",) * (MAX_ADDRESSES + 1)},
        {"epoch": -1},
        {"ttl": float("nan")},
        {"providers": tuple(ProviderAdvert(name=f"p{i}") for i in range(MAX_PROVIDERS + 1))},
        {"providers": (ProviderAdvert(name="p", slots=0),)},
        {"providers": (ProviderAdvert(name="p", rate=float("inf")),)},
        {"providers": (ProviderAdvert(name="p", state="gone"),)},  # type: ignore[arg-type]
    ],
)
def test_fields_out_of_bounds_are_refused_by_both_ends(fields: dict[str, Any]) -> None:
    advert = offering("b", **fields)
    with pytest.raises(ValueError, match="refuse"):
        seal(advert, sign)
    data = encode_value(advert)
    with pytest.raises(RemoteProtocolError):
        open_sealed(encode_value(SignedAdvert(advert=data, signature=sign(data))))


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    for item in (data, encode_value(SignedAdvert(advert=data, signature=b""))):
        with pytest.raises(RemoteProtocolError):
            open_sealed(item)


def test_an_advert_that_is_too_large_is_refused_unread() -> None:
    with pytest.raises(RemoteProtocolError):
        open_sealed(b"\x81" + bytes(MAX_ADVERT + 2000))
