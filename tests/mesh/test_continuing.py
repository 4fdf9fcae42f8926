"""The seam between the parts of an answer: nothing twice, nothing lost, at every place."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
from fakes_mesh import asking
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.mesh.continuing import (
    Mismatch,
    SoFar,
    continued,
    is_same,
    seam_of,
    way_on,
)
from promptmesh.providers.base import (
    Chunk,
    Completion,
    CompletionBuilder,
    GenerateRequest,
    ModelOffer,
    ResponseFormat,
    Sampling,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    Usage,
)
from promptmesh.providers.echo import Echo, EchoSettings

SAME = ModelOffer(id="m", weights="sha256:1", engine="hf 1", numerics="float32", repeatable=True)
CONTINUES = ModelOffer(id="m", can_continue=True)
COUNTS = ModelOffer(id="m", can_continue=True, counts_begun=True)
#: Characters of one to four bytes, of two code points, and that a text is divided at by mistake.
TEXTS = st.text("aé€😀e\u0301\u200d👩\0\r\n ", max_size=12)
CALLS = st.builds(
    ToolCall,
    id=st.sampled_from(["call_1", ""]),
    name=st.sampled_from(["f", "größe"]),
    arguments=TEXTS,
)


def logprob(token: str, value: float = -0.5) -> dict[str, Any]:
    return {"token": token, "logprob": value}


@st.composite
def streams(draw: st.DrawFn, whole: Completion) -> list[Chunk]:
    """One of the ways in which an answer can come."""
    chunks = [Chunk(reasoning=piece) for piece in draw(cuts(whole.reasoning))]
    tokens = list(whole.logprobs)
    for piece in draw(cuts(whole.text)):
        count = draw(st.integers(0, len(tokens)))
        chunks.append(Chunk(text=piece, logprobs=tuple(tokens[:count])))
        del tokens[:count]
    if tokens:
        chunks.append(Chunk(logprobs=tuple(tokens)))
    for index, call in enumerate(whole.tool_calls):
        head = ToolCallDelta(index=index, id=call.id, name=call.name)
        rest = [ToolCallDelta(index=index, arguments=a) for a in draw(cuts(call.arguments))]
        chunks += [Chunk(tool_calls=(delta,)) for delta in (head, *rest)]
    if draw(st.booleans()):  # several at once
        chunks = list(merged(chunks, draw(st.integers(1, 4))))
    return [*chunks, Chunk(finish_reason=whole.finish_reason, usage=whole.usage, cid="bafy")]


@st.composite
def cuts(draw: st.DrawFn, text: str) -> list[str]:
    places = sorted(draw(st.sets(st.integers(1, max(len(text) - 1, 1)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    return [piece for piece in pieces if piece]


def merged(chunks: Sequence[Chunk], size: int) -> Iterator[Chunk]:
    for at in range(0, len(chunks), size):
        group = chunks[at : at + size]
        yield Chunk(
            text="".join(c.text for c in group),
            reasoning="".join(c.reasoning for c in group),
            logprobs=tuple(p for c in group for p in c.logprobs),
            tool_calls=tuple(d for c in group for d in c.tool_calls),
        )


ANSWERS = st.builds(
    Completion,
    text=TEXTS,
    reasoning=TEXTS,
    tool_calls=st.lists(CALLS, max_size=2).map(tuple),
    logprobs=st.lists(st.builds(logprob, st.sampled_from("ab€")), max_size=4).map(tuple),
    finish_reason=st.just("stop"),
    usage=st.just(Usage(prompt_tokens=7, completion_tokens=9)),
)


def joined(before: Sequence[Chunk], after: Sequence[Chunk], way: Any) -> list[Chunk]:
    so_far = SoFar()
    for chunk in before:
        so_far.add(chunk)
    seam = seam_of(way, asking(), so_far, CONTINUES)
    rest = [new for chunk in after if (new := seam.join(chunk)) is not None]
    return [*before, *rest]


def built(chunks: Sequence[Chunk]) -> Completion:
    builder = CompletionBuilder()
    for chunk in chunks:
        builder.add(chunk)
    return builder.completion()


@given(st.data(), ANSWERS)
def test_a_restart_gives_the_whole_at_every_cut(data: st.DataObject, whole: Completion) -> None:
    first, second = data.draw(streams(whole)), data.draw(streams(whole))
    for cut in range(len(first)):
        all_of_it = joined(first[:cut], second, "restart")
        assert built(all_of_it) == whole
        assert all_of_it[-1].cid == "bafy"
        for given_ in all_of_it[cut:]:  # and nothing that is empty
            assert given_ != Chunk()


@given(st.data(), TEXTS)
def test_a_continuation_gives_the_whole_at_every_cut(data: st.DataObject, text: str) -> None:
    whole = Completion(text=text, finish_reason="stop")
    first = data.draw(streams(whole))
    for cut in range(len(first)):
        before = first[:cut]
        given_ = "".join(chunk.text for chunk in before)
        rest = Completion(
            text=text[len(given_) :],
            finish_reason="stop",
            usage=Usage(prompt_tokens=5, completion_tokens=3),
        )
        all_of_it = joined(before, data.draw(streams(rest)), "continue")
        assert built(all_of_it).text == text
        assert all_of_it[-1].cid is None  # it names what the second one gave
        usage = built(all_of_it).usage
        assert not usage.exact
        assert usage.completion_tokens >= 3


@given(st.data(), ANSWERS, ANSWERS)
def test_another_answer_is_never_taken_for_the_rest(
    data: st.DataObject, whole: Completion, other: Completion
) -> None:
    first, second = data.draw(streams(whole)), data.draw(streams(other))
    for cut in range(len(first)):
        try:
            all_of_it = joined(first[:cut], second, "restart")
        except Mismatch:
            continue
        # It had the same beginning; so the caller has the other answer, whole.
        ids = [call.id for call in built(all_of_it).tool_calls]
        calls = tuple(
            ToolCall(id=id_, name=c.name, arguments=c.arguments)
            for id_, c in zip(ids, other.tool_calls, strict=True)
        )
        got = built(all_of_it)
        assert (got.text, got.reasoning, got.tool_calls) == (other.text, other.reasoning, calls)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Chunk(text="abc"), Chunk(text="abd")),
        (Chunk(text="abc"), Chunk(text="ab", finish_reason="stop")),
        (Chunk(text="abc"), Chunk(text="ab", reasoning="x")),
        (Chunk(reasoning="a"), Chunk(text="a")),
        (Chunk(text="a", logprobs=(logprob("a"),)), Chunk(text="a", logprobs=(logprob("b"),))),
        (
            Chunk(tool_calls=(ToolCallDelta(index=0, name="f", arguments="{"),)),
            Chunk(tool_calls=(ToolCallDelta(index=0, name="g", arguments="{"),)),
        ),
        (
            Chunk(tool_calls=(ToolCallDelta(index=0, name="f", arguments="{"),)),
            Chunk(tool_calls=(ToolCallDelta(index=1, name="f", arguments="{"),)),
        ),
    ],
)
def test_what_differs_ends_it(before: Chunk, after: Chunk) -> None:
    with pytest.raises(Mismatch):
        joined([before], [after, Chunk(finish_reason="stop")], "restart")


def test_the_id_of_a_call_that_was_sent_stays() -> None:
    head = Chunk(tool_calls=(ToolCallDelta(index=0, id="call_1", name="f", arguments="{"),))
    again = Chunk(tool_calls=(ToolCallDelta(index=0, id="call_2", name="f", arguments='{"a"'),))
    (_, rest) = joined([head], [again], "restart")
    assert rest.tool_calls == (ToolCallDelta(index=0, arguments='"a"'),)


# --- who can


def so_far_of(*chunks: Chunk) -> SoFar:
    so_far = SoFar()
    for chunk in chunks:
        so_far.add(chunk)
    return so_far


TEXT = Chunk(text="Once upon")
COUNTED = Chunk(text="Once upon", logprobs=(logprob("Once"), logprob(" upon")))
SAME_CONTINUES = msgspec.structs.replace(SAME, can_continue=True)
CALL = Chunk(tool_calls=(ToolCallDelta(index=0, name="f", arguments="{"),))


def request_with(**fields: Any) -> GenerateRequest:
    sampling = GenerateRequest(model="m", messages=()).sampling
    names = {name: fields.pop(name) for name in list(fields) if hasattr(sampling, name)}
    return asking(sampling=type(sampling)(**names), **fields)


@pytest.mark.parametrize(
    ("request_", "chunk", "offer", "way"),
    [
        (request_with(), TEXT, CONTINUES, "continue"),
        (request_with(), TEXT, ModelOffer(id="m"), None),
        (request_with(), TEXT, SAME, None),  # another sample
        (request_with(temperature=0.0), TEXT, SAME, "restart"),
        (request_with(seed=1), TEXT, SAME, "restart"),
        (request_with(temperature=0.0), TEXT, ModelOffer(id="m", repeatable=True), None),
        (request_with(), CALL, CONTINUES, None),
        (request_with(temperature=0.0), CALL, SAME, "restart"),
        (request_with(), Chunk(reasoning="Hm"), CONTINUES, None),
        (request_with(temperature=0.0), Chunk(reasoning="Hm"), SAME, "restart"),
        (request_with(response_format=ResponseFormat(type="json_object")), TEXT, CONTINUES, None),
        (request_with(response_format=ResponseFormat(type="text")), TEXT, CONTINUES, "continue"),
        (request_with(tool_choice=ToolChoice(mode="required")), TEXT, CONTINUES, None),
        (request_with(max_tokens=99), TEXT, CONTINUES, None),  # nobody has counted how many it has
        (request_with(max_tokens=99), TEXT, COUNTS, "continue"),  # who goes on does
        (request_with(max_tokens=99, temperature=0.0), TEXT, SAME_CONTINUES, "restart"),
        (request_with(max_tokens=2), COUNTED, CONTINUES, None),
        (request_with(max_tokens=3), COUNTED, CONTINUES, "continue"),
        (request_with(), Chunk(), ModelOffer(id="m"), "restart"),  # nothing was given
    ],
)
def test_who_can_go_on(
    request_: GenerateRequest, chunk: Chunk, offer: ModelOffer, way: str | None
) -> None:
    assert way_on(request_, [SAME], offer, so_far_of(chunk)) == way


@pytest.mark.parametrize(
    "change", [{"weights": "sha256:2"}, {"numerics": "bfloat16"}, {"repeatable": False}]
)
def test_only_the_same_engine_gives_the_same_again(change: dict[str, Any]) -> None:
    fields = {name: getattr(SAME, name) for name in SAME.__struct_fields__}
    other = ModelOffer(**(fields | change))
    request = request_with(temperature=0.0)
    assert is_same(request, [SAME], SAME)
    assert not is_same(request, [SAME], other)
    assert not is_same(request, [SAME, other], SAME)


def test_the_rest_is_asked_for_with_what_is_left_of_its_tokens() -> None:
    counted = Chunk(text="Once upon a time", logprobs=tuple(logprob(t) for t in "abcde"))
    rest = continued(request_with(max_tokens=20, prefix="So: "), so_far_of(counted), COUNTS)
    assert rest.prefix == "So: Once upon a time"
    assert rest.sampling.max_tokens == 15
    assert rest.cache.mode == "bypass"
    assert rest.begun == 0
    rest = continued(request_with(max_tokens=20, prefix="So: "), so_far_of(TEXT), COUNTS)
    assert (rest.prefix, rest.begun, rest.sampling.max_tokens) == ("So: Once upon", 9, 20)
    rest = continued(request_with(), so_far_of(TEXT), COUNTS)
    assert (rest.begun, rest.sampling.max_tokens) == (0, None)
    assert so_far_of(Chunk(text="word " * 20)).tokens == 21  # many in one piece
    assert so_far_of(*[Chunk(text="x")] * 100).tokens == 100


# --- who goes on counts what there is


@given(text=st.text("aé€😀 \n", min_size=1, max_size=40), most=st.integers(1, 12), data=st.data())
async def test_a_limit_holds_for_the_whole_wherever_it_broke(
    text: str, most: int, data: st.DataObject
) -> None:
    request = asking(text=text, sampling=Sampling(max_tokens=most), prefix=text[: len(text) // 3])
    echo = Echo(EchoSettings(models=("m",)))

    async def answer(asked: GenerateRequest) -> list[Chunk]:
        async with echo.open(asked) as answering:
            return [chunk async for chunk in answering.chunks]

    whole = built(await answer(request))
    cut = data.draw(st.integers(1, max(len(whole.text), 1)))
    before = [Chunk(text=whole.text[:cut])] if whole.text else []
    so_far = so_far_of(*before)
    rest = await answer(continued(request, so_far, COUNTS))
    seam = seam_of("continue", request, so_far, COUNTS)
    all_of_it = built([*before, *(new for chunk in rest if (new := seam.join(chunk)))])
    assert (all_of_it.text, all_of_it.finish_reason) == (whole.text, whole.finish_reason)
    assert all_of_it.usage.completion_tokens == whole.usage.completion_tokens <= most
