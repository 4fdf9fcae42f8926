"""Text that comes in pieces: whole characters, stop strings, log probabilities."""

from __future__ import annotations

from typing import Any

import pytest
from fakes_hf import END, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers.hf_text import AnswerText
from promptmesh.providers.stop_strings import StopScanner

SAMPLES = [
    "Hello world, hello there.",
    "日本語のテキストです。",
    "한국어 문장입니다",
    "مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🇩🇪🇫🇷 e\u0301 \t tabs\n\n  spaces",
    "🌍" * 20,
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def pieces_of(text: AnswerText, tokens: list[int]) -> list[str]:
    pieces = []
    for token in tokens:
        text.push(token)
        pieces.append(text.take()[0])
    text.close()
    return [*pieces, text.take()[0]]


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_pieces_are_whole_characters_and_make_the_text(tokenizer: Any, sample: str) -> None:
    tokens = tokenizer.encode(sample).ids
    pieces = pieces_of(AnswerText(tokenizer, (), ()), tokens)
    assert "".join(pieces) == sample
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(1 for piece in pieces if piece) > len(sample) / 10  # it does stream


def test_a_character_that_stays_incomplete_is_left_out(tokenizer: Any) -> None:
    tokens = tokenizer.encode("ab🌍").ids
    assert "".join(pieces_of(AnswerText(tokenizer, (), ()), tokens[:-1])) == "ab"


def test_special_tokens_are_no_text(tokenizer: Any) -> None:
    tokens = tokenizer.encode("a").ids
    assert "".join(pieces_of(AnswerText(tokenizer, (), ()), [*tokens, END, *tokens])) == "aa"


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_text_goes_on_after_its_primer(tokenizer: Any, sample: str) -> None:
    primer = tokenizer.encode("The quick brown fox and a 🌍").ids
    tokens = tokenizer.encode(sample).ids
    assert "".join(pieces_of(AnswerText(tokenizer, (), primer), tokens)) == sample


ALPHABET = st.text(alphabet="ab\n", max_size=30)


@given(
    st.lists(ALPHABET, max_size=8),
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3),
)
def test_the_scanner_gives_the_text_before_the_first_stop(
    pieces: list[str], stops: list[str]
) -> None:
    scanner = StopScanner(stops)
    out = ""
    for piece in pieces:
        out += scanner.feed(piece)
        # Nothing that went out ever has to be taken back.
        assert not any(stop in out for stop in stops)
    if not scanner.found:
        out += scanner.flush()
    whole = "".join(pieces)
    ends = [whole.index(stop) for stop in stops if stop in whole]
    assert scanner.found == bool(ends)
    if not ends:
        assert out == whole
    else:
        # With several stops the one that is complete first wins.
        assert whole.startswith(out)
        assert any(whole.startswith(out + stop) for stop in stops)


def test_only_the_possible_beginning_of_a_stop_is_held_back() -> None:
    scanner = StopScanner(("STOP",))
    assert [scanner.feed(piece) for piece in ("abc", "S", "T", "x", "STO")] == [
        "abc",
        "",
        "",
        "STx",
        "",
    ]
    assert scanner.feed("P!") == ""
    assert scanner.found
    assert scanner.feed("more") == ""
    assert scanner.flush() == ""


def test_a_stop_string_over_several_tokens_ends_the_text(tokenizer: Any) -> None:
    text = AnswerText(tokenizer, ("lazy d",), ())
    taken = ""
    for token in tokenizer.encode("The quick brown fox jumps over the lazy dog.").ids:
        text.push(token)
        taken += text.take()[0]
        if text.stopped:
            break
    assert text.stopped
    assert taken == "The quick brown fox jumps over the "


def test_the_entries_come_with_the_text_of_their_tokens(tokenizer: Any) -> None:
    text = AnswerText(tokenizer, ("dog",), ())
    words: list[str] = []
    entries: list[Any] = []
    for token in tokenizer.encode("lazy dig dog after").ids:
        if not text.stopped:
            text.push(token, {"token": tokenizer.decode([token])})
        piece, new = text.take()
        words.append(piece)
        entries += new
    shown = "".join(entry["token"] for entry in entries)
    assert "".join(words) == "lazy dig "
    # A token that reaches into the stop string, such as " d", is the last that may be shown.
    assert shown.startswith("lazy dig")
    assert len(shown) <= len("lazy dig dog") - 1


def test_entries_of_a_character_in_several_tokens_come_with_it(tokenizer: Any) -> None:
    text = AnswerText(tokenizer, (), ())
    tokens = tokenizer.encode("🌍").ids
    assert len(tokens) > 1
    seen = []
    for number, token in enumerate(tokens):
        text.push(token, {"n": number})
        seen.append(text.take())
    assert seen[-1][0] == "🌍"
    assert [entry["n"] for _, entries in seen for entry in entries] == list(range(len(tokens)))
