import hashlib
import json
import math
import os
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import cbrrr
import dag_cbor
import msgspec
import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.cache import keys
from promptmesh.cache.cid import cid_bytes, cid_text, parse_cid
from promptmesh.cache.keys import (
    KEYED,
    canonical,
    key_text,
    mesh_key,
    namespace_secret,
    namespace_tag,
    request_key,
)
from promptmesh.providers.base import (
    TRANSPORT,
    CacheControl,
    GenerateRequest,
    Image,
    Message,
    RequestRejected,
    ResponseFormat,
    Sampling,
    Text,
    TimeLimits,
    Tool,
    ToolCall,
    ToolChoice,
)

replace = msgspec.structs.replace


def user(text: str) -> Message:
    return Message(role="user", content=(Text(text=text),))


PLAIN = GenerateRequest(model="m", messages=(user("hello"),))
#: Every field set.
FULL = GenerateRequest(
    model="smollm2-135m-instruct",
    messages=(
        Message(role="system", content=(Text(text="Be brief. é 🎈"),), name="boss"),
        Message(
            role="user",
            content=(
                Text(text="What is this?"),
                Image(url="data:image/png;base64,AAAA", detail="low"),
            ),
        ),
        Message(
            role="assistant",
            reasoning="hm",
            tool_calls=(ToolCall(id="c1", name="look", arguments='{"x":1}'),),
        ),
        Message(role="tool", content=(Text(text="a cat"),), tool_call_id="c1"),
    ),
    sampling=Sampling(
        temperature=0.7,
        top_p=0.95,
        top_k=40,
        max_tokens=100,
        stop=("\n\n", "END"),
        seed=42,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        logit_bias={"50256": -100.0},
        logprobs=True,
        top_logprobs=5,
    ),
    tools=(
        Tool(
            name="look",
            description="Looks.",
            parameters={"type": "object", "properties": {"x": {"type": "integer", "minimum": 0}}},
            strict=True,
        ),
    ),
    tool_choice=ToolChoice(mode="function", name="look"),
    parallel_tool_calls=False,
    response_format=ResponseFormat(
        type="json_schema", name="cat", schema={"type": "object"}, strict=True
    ),
    prefix="It is",
    dialect="openai",
    extra={"repetition_penalty": 1.1, "user": "u1"},
    cache=CacheControl(namespace="team"),
)

# The same on every Python, machine and version: a change here empties every cache.
KNOWN = [
    (PLAIN, "304540bfad8801576c13c5b38f3dcebc5652988b81f9a2f3fec7353c7722cd1e"),
    (
        replace(PLAIN, sampling=Sampling(temperature=0)),
        "68b3da2c8498b202bad853b2dbf3b1f46a0f5089f00c5dbbf026bedd7ae2c4fe",
    ),
    (
        replace(PLAIN, sampling=Sampling(temperature=0.1, seed=2**64 - 1)),
        "103b97f28e60d12996d42b13e3b71b7e94cdded8ef3ee08602d680be05f6ef91",
    ),
    (
        replace(PLAIN, messages=()),
        "f1aaf506a97c8f56a7430bc1f648e8f6930a368ff462b90ee3d3dbe91f7028b7",
    ),
    (
        replace(PLAIN, cache=CacheControl(namespace="n")),
        "bc6c0e53e924bfd0299720773338ada353fda0a3b476848865877ff2d718de95",
    ),
    (
        replace(PLAIN, messages=(user("é e\u0301 🎈 \x00"),), prefix="ja, "),
        "f461cedc88ce914a67dc49067c3d0f65bd1d90282eeb55b884f38699793bbeea",
    ),
    (
        replace(PLAIN, messages=(Message(role="user", content=FULL.messages[1].content),)),
        "8f0f5b3a476c5aa28ab4fda0c0773bb958573e00368fd19e83e51c88ba8f5ed0",
    ),
    (
        replace(PLAIN, tools=FULL.tools, tool_choice=ToolChoice(), parallel_tool_calls=True),
        "ed980701ede238e17bf99d94a5f5bcda1d808f1b10d24f40a5ad10df304aad46",
    ),
    (
        replace(PLAIN, response_format=FULL.response_format),
        "9b53af87aa6060968fb0de0a98a2d4a2fceacf343fe34b27e8e9727b30fc7a03",
    ),
    (
        replace(PLAIN, sampling=Sampling(stop=("a", "b"), logit_bias={"2": 1.5, "10": -1.0})),
        "0ed0747ff33b281da6684ac902cbed734bbae9a7ac1195022c0be8b8eb2245b0",
    ),
    (
        replace(PLAIN, extra={"top_a": 1e300, "n": 2**64, "user": "u", "z": [None, True]}),
        "636bae3e365b968bc7d40748f7f1b6381f7e04a2f5347ef7be9fe6fd870101fc",
    ),
    (FULL, "4495abd847599e4dee8fe61c9c800c4ead713bb9303e58ff5572d25a5cddc6ad"),
]


@pytest.mark.parametrize(("request_", "key"), KNOWN)
def test_known_keys(request_: GenerateRequest, key: str) -> None:
    assert key_text(request_) == key


def test_keys_do_not_depend_on_how_this_process_hashes() -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); from test_keys import KNOWN, key_text; "
    program += "print([key_text(request) for request, _ in KNOWN])"
    printed = {
        subprocess.run(
            [sys.executable, "-c", program, str(Path(__file__).parent)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert printed == {f"{[key for _, key in KNOWN]}\n"}


def test_the_canonical_form_is_readable_dag_cbor() -> None:
    assert cbrrr.decode_dag_cbor(canonical(PLAIN)) == {
        "v": 1,
        "kind": "llm-request",
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
    }
    block = canonical(FULL)
    assert dag_cbor.encode(dag_cbor.decode(block)) == block


# --- which field counts -------------------------------------------------------------------------

#: For every field of the vocabulary: another value than the one in FULL.
OTHER: dict[type[msgspec.Struct], dict[str, Any]] = {
    GenerateRequest: {
        "model": "other",
        "messages": FULL.messages[:1],
        "sampling": Sampling(),
        "tools": (),
        "tool_choice": None,
        "parallel_tool_calls": None,
        "response_format": None,
        "prefix": "",
        "begun": 3,
        "dialect": "ollama",
        "extra": {},
    },
    Message: {
        "role": "developer",
        "content": (),
        "name": None,
        "reasoning": "r",
        "tool_calls": (ToolCall(id="c", name="n", arguments="{}"),),
        "tool_call_id": "c2",
    },
    Text: {"text": "other"},
    Image: {"url": "https://example.com/a.png", "detail": None},
    ToolCall: {"id": "c2", "name": "other", "arguments": '{"x": 1}'},
    Tool: {"name": "other", "description": None, "parameters": {}, "strict": None},
    ToolChoice: {"mode": "auto", "name": None},
    ResponseFormat: {"type": "json_object", "name": None, "schema": None, "strict": None},
    Sampling: {
        "temperature": None,
        "top_p": 1,
        "top_k": None,
        "max_tokens": 101,
        "stop": ("END", "\n\n"),
        "seed": 43,
        "presence_penalty": 0,
        "frequency_penalty": None,
        "logit_bias": {"50256": 100},
        "logprobs": False,
        "top_logprobs": 4,
    },
    CacheControl: {"namespace": ""},
}
#: Fields that say who may answer, how, and how long that may take.
NO_PART: dict[type[msgspec.Struct], dict[str, Any]] = {
    GenerateRequest: {
        "provider": "p",
        "peer": "q",
        "policy": "round_robin",
        "privacy": "local",
        "priority": "background",
        "limits": TimeLimits(gap=1.0),
        "hedge": True,
        "asker": "p",
        "max_cost": 0.5,
        "prefer": "any",
        "deadline": 3.0,
        "id": "r-1",
    },
    CacheControl: {
        "mode": "refresh",
        "ttl": 1.0,
        "max_age": 1.0,
        "scope": "local",
        "min_agreement": 2,
        "any_sample": True,
    },
}


def places(value: Any) -> Any:
    """Each value of the vocabulary inside `value`, with what puts another in its place."""
    if isinstance(value, msgspec.Struct):
        yield value, lambda other: other
        for name in value.__struct_fields__:
            for found, put in places(getattr(value, name)):
                yield found, lambda other, name=name, put=put: replace(value, **{name: put(other)})
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            for found, put in places(item):
                yield (
                    found,
                    lambda other, i=i, put=put: (*value[:i], put(other), *value[i + 1 :]),
                )


def test_every_field_that_decides_the_answer_changes_the_key() -> None:
    seen = set()
    for value, put in places(FULL):
        for name, other in OTHER[type(value)].items():
            if getattr(value, name) == other:
                continue
            changed = put(replace(value, **{name: other}))
            assert request_key(changed) != request_key(FULL), (type(value), name)
            seen.add((type(value), name))
    assert seen == {(kind, name) for kind, fields in OTHER.items() for name in fields}


def test_no_other_field_changes_the_key() -> None:
    for value, put in places(FULL):
        for name, other in NO_PART.get(type(value), {}).items():
            assert getattr(value, name) != other
            assert request_key(put(replace(value, **{name: other}))) == request_key(FULL), name


def test_every_field_of_the_vocabulary_is_on_one_side() -> None:
    for kind, fields in OTHER.items():
        sides = [*fields, *NO_PART.get(kind, {})]
        if kind is GenerateRequest:
            sides.append("cache")  # by its own fields
        assert sorted(kind.__struct_fields__) == sorted(sides)
    assert set(KEYED) <= set(OTHER[GenerateRequest])


@pytest.mark.parametrize("name", sorted(TRANSPORT))
def test_transport_fields_of_extra_do_not_count(name: str) -> None:
    extra = {name: {"any": "thing"}}
    assert request_key(replace(PLAIN, extra=extra, dialect="openai")) == request_key(PLAIN)
    nested = replace(PLAIN, extra={"options": extra})
    assert request_key(nested) != request_key(replace(PLAIN, extra={"options": {}}))


def test_the_dialect_counts_only_with_extra_fields() -> None:
    assert request_key(replace(PLAIN, dialect="ollama")) == request_key(PLAIN)
    one, two = (replace(PLAIN, dialect=d, extra={"x": 1}) for d in ("ollama", "openai"))
    assert request_key(one) != request_key(two)


# --- what means the same ------------------------------------------------------------------------


def schema_request(schema: Any) -> GenerateRequest:
    return replace(PLAIN, tools=(Tool(name="t", parameters=schema),), extra={"guided": schema})


class Shade(str, Enum):  # noqa: UP042 - the older form is the one that must work
    RED = "red"


class Half(float):
    pass


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (0, 0.0),
        (1, 1.0),
        (-0.0, 0.0),
        (2**53, float(2**53)),
        (2**64, float(2**64)),
        (10**22, 1e22),
        ({"a": 1, "b": {"c": 2, "d": 3.0}}, {"b": {"d": 3, "c": 2.0}, "a": 1.0}),
        ([1.0, (2,)], (1, [2.0])),
        ({1: "a"}, {"1": "a"}),
        (Shade.RED, "red"),
        (Half(0.5), 0.5),
    ],
)
def test_equal_values_have_equal_keys(one: Any, two: Any) -> None:
    assert request_key(schema_request({"v": one})) == request_key(schema_request({"v": two}))
    if isinstance(one, int | float):
        first, second = (
            replace(PLAIN, sampling=Sampling(temperature=n, logit_bias={"1": n}))
            for n in (one, two)
        )
        assert request_key(first) == request_key(second)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (0, False),
        (1, True),
        (0, None),
        ("1", 1),
        ("", None),
        ([], {}),
        (0.1, 0.1 + 2**-56),
        (0.1, 0.10000001),
        (2**64, 2**64 + 1),
        (10**400, 10**400 + 1),
        (math.inf, 10**400),
        (math.nan, math.inf),
        ([1, 2], [2, 1]),
        ([[1], 2], [[1, 2]]),
        ("\u00e9", "e\u0301"),
        ("nan", math.nan),
    ],
)
def test_other_values_have_other_keys(one: Any, two: Any) -> None:
    assert request_key(schema_request({"v": one})) != request_key(schema_request({"v": two}))


def test_a_default_said_is_another_request_where_a_provider_may_differ() -> None:
    for sampling in (Sampling(temperature=1), Sampling(top_p=1), Sampling(max_tokens=0)):
        assert request_key(replace(PLAIN, sampling=sampling)) != request_key(PLAIN)
    said = replace(PLAIN, tool_choice=ToolChoice(), response_format=ResponseFormat())
    assert request_key(said) != request_key(PLAIN)
    same = replace(PLAIN, sampling=Sampling(stop=(), logprobs=False), tools=(), prefix="")
    assert request_key(same) == request_key(PLAIN)


def test_a_request_that_crossed_the_wire_keeps_its_key() -> None:
    packed = msgspec.msgpack.encode(FULL)
    assert request_key(msgspec.msgpack.decode(packed, type=GenerateRequest)) == request_key(FULL)
    there = msgspec.json.decode(msgspec.json.encode(FULL), type=GenerateRequest)
    assert request_key(there) == request_key(FULL)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from([0.0, 1.0, -0.0, 0.5, 1e300])
    | st.sampled_from(["", "a", "1"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=4,
)
NUMBER = st.none() | st.sampled_from([0, 0.0, 1, 1.0, 0.5])
MESSAGES = st.lists(
    st.builds(
        Message,
        role=st.sampled_from(["user", "assistant"]),
        content=st.lists(
            st.builds(Text, text=st.sampled_from(["", "a", "b", "ab"])), max_size=2
        ).map(tuple),
        name=st.none() | st.just("a"),
    ),
    max_size=2,
).map(tuple)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["m", "n"]),
    "messages": MESSAGES,
    "sampling": st.builds(
        Sampling,
        temperature=NUMBER,
        top_p=NUMBER,
        seed=st.none() | st.integers(0, 1),
        stop=st.lists(st.sampled_from("ab"), max_size=2).map(tuple),
    ),
    "tools": st.lists(
        st.builds(Tool, name=st.just("t"), parameters=st.dictionaries(st.just("p"), JSON)),
        max_size=1,
    ).map(tuple),
    "tool_choice": st.none() | st.just(ToolChoice()),
    "prefix": st.sampled_from(["", "a"]),
    "extra": st.dictionaries(st.sampled_from(["x", "user"]), JSON, max_size=2),
    "privacy": st.sampled_from(["any", "local"]),
    "cache": st.builds(CacheControl, namespace=st.sampled_from(["", "a"]), ttl=NUMBER),
    "id": st.sampled_from(["", "r"]),
}


def meaning(value: Any) -> Any:
    """The value so that Python's own equality says whether two mean the same."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, dict):
        return {name: meaning(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [meaning(item) for item in value]
    return value


def decides(request: GenerateRequest) -> Any:
    fields = msgspec.to_builtins(request)
    for name in ("privacy", "id"):
        fields.pop(name, None)
    fields["extra"] = {n: v for n, v in fields.get("extra", {}).items() if n != "user"}
    fields["cache"] = request.cache.namespace
    return meaning(fields)


@given(st.data())
def test_keys_are_equal_exactly_where_requests_mean_the_same(data: st.DataObject) -> None:
    request = GenerateRequest(**{name: data.draw(field) for name, field in FIELDS.items()})
    name = data.draw(st.sampled_from(sorted(FIELDS)))
    other = replace(request, **{name: data.draw(FIELDS[name])})
    same = decides(request) == decides(other)
    assert (request_key(request) == request_key(other)) is same
    block = canonical(request)
    assert cbrrr.encode_dag_cbor(cbrrr.decode_dag_cbor(block)) == block


@given(JSON, st.randoms())
def test_the_order_of_object_keys_does_not_count(value: Any, random: Any) -> None:
    def shuffled(item: Any) -> Any:
        if isinstance(item, list):
            return [shuffled(inner) for inner in item]
        if not isinstance(item, dict):
            return item
        names = list(item)
        random.shuffle(names)
        return {name: shuffled(item[name]) for name in names}

    wrapped = {"a": value, "b": 1, "c": {"d": value, "e": 2}}
    other = shuffled(wrapped)
    assert json.dumps(wrapped, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert request_key(schema_request(wrapped)) == request_key(schema_request(other))


# --- what is no request -------------------------------------------------------------------------


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value", [b"bytes", object(), {1, 2}, "\ud800", {"\udfff": 1}, deep(5000), cbrrr.CID(b"")]
)
def test_what_json_does_not_have_is_the_requests_fault(value: Any) -> None:
    with pytest.raises(RequestRejected):
        request_key(replace(PLAIN, extra={"x": value}))


# --- text and secrets ---------------------------------------------------------------------------


def test_the_forms_of_a_key() -> None:
    key = request_key(FULL)
    assert key == hashlib.sha256(canonical(FULL)).digest()
    assert key_text(FULL) == key_text(key, "sha256") == key.hex()
    assert key_text(FULL, "cid") == cid_text(cid_bytes(canonical(FULL)))
    assert parse_cid(key_text(key, "cid", "base58btc")) == cid_bytes(canonical(FULL))


def test_a_form_that_cannot_be_made_is_an_error() -> None:
    with pytest.raises(ValueError, match="base"):
        key_text(FULL, "cid", "base31")
    with pytest.raises(ValueError, match="form"):
        key_text(FULL, "md5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="32 bytes"):
        key_text(b"short")


@pytest.mark.parametrize("swarm_key", [None, b"k" * 32])
@pytest.mark.parametrize("name", ["", "team", "é"])
def test_namespace_secret_is_hkdf(swarm_key: bytes | None, name: str) -> None:
    hkdf = HKDF(SHA256(), 32, salt=b"promptmesh-namespace-1", info=name.encode())
    assert namespace_secret(swarm_key, name) == hkdf.derive(swarm_key or bytes(32))


def test_mesh_keys_differ_by_namespace_mesh_and_request() -> None:
    keys = {
        mesh_key(namespace_secret(swarm, name), request_key(request))
        for swarm in (None, b"a" * 32, b"b" * 32)
        for name in ("", "team", "team2")
        for request in (PLAIN, FULL)
    }
    assert len(keys) == 18
    assert {len(key) for key in keys} == {32}
    tags = {namespace_tag(namespace_secret(b"a" * 32, name)) for name in ("", "team")}
    assert len(tags) == 2
    assert {len(tag) for tag in tags} == {8}


def _asked(**sampling: Any) -> GenerateRequest:
    return msgspec.structs.replace(PLAIN, sampling=Sampling(**sampling))


def test_a_remembered_key_is_the_one_that_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two requests that mean the same are remembered apart."""
    monkeypatch.setattr(keys, "_keys", {})
    whole, fraction = (_asked(temperature=t) for t in (1, 1.0))
    made = [request_key(each) for each in (whole, fraction)]
    assert [request_key(each) for each in (whole, fraction)] == made
    assert made[0] == made[1] == hashlib.sha256(canonical(whole)).digest()
    monkeypatch.setattr(keys, "MAX_REMEMBERED", 2)
    others = [_asked(seed=seed) for seed in range(5)]
    assert len({request_key(each) for each in others}) == 5
    assert len(keys._keys) <= 2
