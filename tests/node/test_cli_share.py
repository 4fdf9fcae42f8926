"""What `promptmesh open` makes of what strangers wrote."""

import json
from pathlib import Path
from typing import Any

import cbrrr
from fakes_cli import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from promptmesh.cache import share
from promptmesh.cache.records import AnswerRecord, encode
from promptmesh.mesh.identity import Identity
from promptmesh.providers.base import Completion

EVE = Identity(b"e" * 32)
ESCAPES = "\x1b[2J\x1b]0;owned\x07 \u202e"


def written(request: Any, text: str = "fine") -> bytes:
    answer = encode(
        AnswerRecord(model=text, completion=Completion(text=text, finish_reason="stop"))
    )
    block = cbrrr.encode_dag_cbor({"v": 1, "kind": "llm-request", **request})
    made = share.make(answer.blocks, (), block, peer=EVE.peer_id, sign=EVE.sign, now=2**52)
    return made.car()


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=5) | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "text", "namespace", "/"]), inner
        )
    ),
    max_leaves=8,
)


def file_of(folder: Path, request: Any, text: str = "fine") -> str:
    path = folder / "share.car"
    path.write_bytes(written(request, text))
    return str(path)


def test_a_terminal_obeys_no_share(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": f"hello {ESCAPES}"}]
    request = {"messages": [{"role": f"user{ESCAPES}", "content": parts}], "model": ESCAPES}
    ran = run(tmp_path, "open", file_of(tmp_path, request, f"answer {ESCAPES}"), tty=True)
    assert ran.code == 0
    assert "answer" in ran.out
    assert "hello" in ran.err
    assert not set("\x1b\x07\u202e") & set(ran.out + ran.err)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=st.dictionaries(st.sampled_from(["messages", "namespace", "tools", "/"]), VALUES))
def test_any_request_is_shown(tmp_path: Path, request: Any) -> None:
    source = file_of(tmp_path, request)
    shown, told = run(tmp_path, "open", source), run(tmp_path, "open", source, "--json")
    assert (shown.code, shown.out, told.code) == (0, "fine\n", 0)
    assert json.loads(told.out)["verified"] is True


def test_a_request_without_dag_json_is_shown_as_bytes(tmp_path: Path) -> None:
    ran = run(tmp_path, "open", file_of(tmp_path, {"tools": {"/": "no link"}}), "--json")
    assert list(json.loads(ran.out)["request"]["/"]) == ["bytes"]


def test_a_folder_and_a_large_file_are_no_shares(tmp_path: Path) -> None:
    large = tmp_path / "large.car"
    with large.open("wb") as file:
        file.truncate(1 << 33)
    for path, why in ((tmp_path, "cannot be read"), (large, "has more than")):
        ran = run(tmp_path, "open", str(path))
        assert (ran.code, why in ran.err) == (1, True)
