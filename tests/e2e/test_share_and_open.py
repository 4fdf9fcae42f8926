"""Answers leave the mesh as files, and are verified where there is none."""

import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from daemons import ECHO, Daemon, clean_environment, mesh, until
from js_ipfs import JsIpfs

pytestmark = pytest.mark.e2e

PROMPT = "to be or not to be"
SCOPE = {"x-promptmesh-cache-scope": "local"}


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Daemon]:
    daemon = Daemon(tmp_path / "a", "a", ECHO)
    try:
        yield await daemon.start()
    finally:
        await daemon.aclose()


async def stored(node: Daemon, prompt: str = PROMPT, **options: Any) -> str:
    answer = await node.chat(prompt, "echo", temperature=0, **options)
    return answer.headers["x-promptmesh-cid"]


async def run(
    node: Daemon, *arguments: str, stdin: bytes = b"", folder: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """`promptmesh ...` on that home, in that working folder."""
    return await trio.run_process(
        node._command(*arguments),
        stdin=stdin,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        cwd=folder,
        env=clean_environment(),
    )


def question(tmp_path: Path, prompt: str = PROMPT, **fields: Any) -> str:
    body = {"model": "echo", "messages": [{"role": "user", "content": prompt}]}
    path = tmp_path / "request.json"
    path.write_text(json.dumps(body | {"temperature": 0} | fields))
    return str(path)


async def claimed(node: Daemon, cid: str) -> None:
    """Until the node has signed its claim of an answer."""

    async def signed() -> bool:
        shown = await run(node, "open", cid, "--json")
        return bool(json.loads(shown.stdout)["claims"])

    await until(signed, f"{cid} is claimed; {node.log}")


async def test_out_of_the_mesh_and_verified_elsewhere(node: Daemon, tmp_path: Path) -> None:
    cid = await stored(node)
    await claimed(node, cid)
    made = await run(node, "share", cid, "--request", question(tmp_path), folder=tmp_path)
    assert made.returncode == 0, made.stderr.decode()
    file = tmp_path / f"{cid}.car"
    assert made.stdout.decode().strip() == file.name
    await node.stop()

    member = json.loads((await run(node, "open", str(file), "--json")).stdout)
    assert (member["verified"], member["text"], member["answer"]) == (True, PROMPT, cid)
    assert [claim["about_request"] for claim in member["claims"]] == [True]
    assert member["request"]["messages"][0]["content"] == [{"type": "text", "text": PROMPT}]

    stranger = Daemon(tmp_path / "elsewhere", "b")
    shown = await run(stranger, "open", str(file))
    assert shown.returncode == 0, shown.stderr.decode()
    assert shown.stdout.decode().strip() == PROMPT
    assert f"shared by {member['peer']}" in shown.stderr.decode()
    assert "only members can tell" in shown.stderr.decode()
    told = json.loads((await run(stranger, "open", str(file), "--json")).stdout)
    assert [claim["about_request"] for claim in told["claims"]] == [None]


async def test_a_file_that_was_changed_does_not_verify(node: Daemon, tmp_path: Path) -> None:
    cid = await stored(node)
    data = (await run(node, "share", cid, "-o", "-")).stdout
    for changed in (data[:-1], data[:-1] + b"x", data + b"\x00", b"", b"x" * 100):
        opened = await run(node, "open", "-", stdin=changed)
        assert opened.returncode == 1
        assert b"does not verify" in opened.stderr
        assert opened.stdout == b""
    assert (await run(node, "open", "-", stdin=data)).returncode == 0


async def test_nothing_is_written_over_unasked(node: Daemon, tmp_path: Path) -> None:
    cid = await stored(node)
    file = tmp_path / "mine.car"
    file.write_text("mine")
    refused = await run(node, "share", cid, "-o", str(file))
    assert refused.returncode == 1
    assert b"--force" in refused.stderr
    assert file.read_text() == "mine"
    assert (await run(node, "share", cid, "-o", str(file), "--force")).returncode == 0
    assert (await run(node, "open", str(file))).returncode == 0


async def test_another_question_does_not_go_along(node: Daemon, tmp_path: Path) -> None:
    cid = await stored(node)
    for wrong in (question(tmp_path, "to be"), question(tmp_path, seed=7)):
        refused = await run(node, "share", cid, "--request", wrong, folder=tmp_path)
        assert refused.returncode == 1
        assert b"its key is another" in refused.stderr
    assert not (tmp_path / f"{cid}.car").exists()


async def test_a_prompt_as_ask_sent_it(node: Daemon, tmp_path: Path) -> None:
    asked = json.loads(await node.cli("ask", PROMPT, "--json"))
    prompt = f"{PROMPT}\n".encode()
    made = await run(node, "share", asked["cid"], "--with-request", "-o", "-", stdin=prompt)
    assert made.returncode == 0, made.stderr.decode()
    opened = json.loads((await run(node, "open", "-", "--json", stdin=made.stdout)).stdout)
    assert opened["request"]["model"] == "echo"


async def test_what_was_not_meant_for_others_takes_consent(node: Daemon, tmp_path: Path) -> None:
    local = await stored(node, "a secret", headers=SCOPE)
    named = await stored(node, "ours", headers={"x-promptmesh-cache-namespace": "team"})
    for cid, why in ((local, b"scope is `local`"), (named, b"namespace 'team'")):
        refused = await run(node, "share", cid, folder=tmp_path)
        assert refused.returncode == 1
        assert why in refused.stderr
        assert b"--private" in refused.stderr
        assert not (tmp_path / f"{cid}.car").exists()
        made = await run(node, "share", cid, "--private", "-o", "-")
        assert (await run(node, "open", "-", stdin=made.stdout)).returncode == 0
        # Its owner may look at it.
        assert (await run(node, "open", cid)).returncode == 0


async def test_a_claim_of_a_peer_goes_along(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "c": ECHO}) as (a, c):
        await a.wait_for_model("echo")
        cid = await stored(a)
        await claimed(a, cid)
        made = await run(a, "share", cid, "--request", question(tmp_path), "-o", "-")
        assert made.returncode == 0, made.stderr.decode()
        opened = json.loads((await run(c, "open", "-", "--json", stdin=made.stdout)).stdout)
        producer = (await c.json("/mesh/v1/status"))["peer"]
        assert producer in {claim["peer"] for claim in opened["claims"]}
        assert opened["peer"] == (await a.json("/mesh/v1/status"))["peer"]
        assert all(claim["about_request"] for claim in opened["claims"])
        bare = await run(a, "share", cid, "--no-claims", "-o", "-")
        without = json.loads((await run(c, "open", "-", "--json", stdin=bare.stdout)).stdout)
        assert (without["verified"], without["claims"]) == (True, [])


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("share", "bafyreinothing"), 1, b"begins so"),
        (("share", "not a cid!"), 1, b"is no CID"),
        (("share", "CID", "--pin"), 1, b"no Kubo is configured"),
        (("share", "CID", "--pin", "-o", "x"), 2, b"writes no file"),
        (("share", "CID", "--request", "/nowhere"), 1, b"cannot be read"),
        (("share", "CID", "-o", "/nowhere/x.car"), 1, b"cannot be written"),
        (("open", "/nowhere/x.car"), 1, b"is no CID"),
        (("open", "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"), 1, b"not found"),
        (("open", "x" * 300), 1, b"no CID"),
    ],
)
async def test_what_goes_wrong_is_said(
    node: Daemon, arguments: tuple[str, ...], code: int, why: bytes
) -> None:
    cid = await stored(node)
    done = await run(node, *[cid if word == "CID" else word for word in arguments])
    assert (done.returncode, why in done.stderr) == (code, True), done.stderr.decode()


async def test_without_a_node_only_files_are_read(tmp_path: Path) -> None:
    opened = await run(Daemon(tmp_path, "a"), "open", "bafyreinothing")
    assert opened.returncode == 1
    assert b"no node runs here" in opened.stderr


@pytest.mark.interop
async def test_pinned_in_a_real_daemon_and_read_from_there(tmp_path: Path) -> None:
    with JsIpfs(tmp_path / "js-ipfs") as daemon:
        config = f'{ECHO}[kubo]\napi = "{daemon.api}"\n'
        node = Daemon(tmp_path / "a", "a", config)
        other = Daemon(tmp_path / "b", "b", f'[kubo]\napi = "{daemon.api}"\n')
        try:
            await node.start()
            cid = await stored(node)
            await claimed(node, cid)
            request = question(tmp_path)
            pinned = await run(node, "share", cid, "--pin", "--request", request, "--json")
            assert pinned.returncode == 0, pinned.stderr.decode()
            share = json.loads(pinned.stdout)
            assert (share["kubo"], share["public"]) == (
                daemon.api.replace("/ip4/", "http://").replace("/tcp/", ":").removesuffix("/http"),
                "",
            )
            # Another node, of another mesh, with the same daemon.
            await other.start()
            opened = await run(other, "open", share["cid"], "--json")
            assert opened.returncode == 0, opened.stderr.decode()
            found = json.loads(opened.stdout)
            assert (found["text"], found["verified"]) == (PROMPT, True)
            assert len(found["claims"]) == 1
        finally:
            await node.aclose()
            await other.aclose()
