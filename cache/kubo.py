"""Blocks in a Kubo daemon, by its RPC: `ipfshttpclient` in threads, and `httpx` for the rest.

The daemon is another program: it may be slow, gone or full, or lie. Whatever it does costs a miss
within `timeout`, and the first of a row of faults one line in the log. What it sends is bounded,
and checked against the CID. It is asked for what it holds, and told to look nowhere else.
"""

from __future__ import annotations

import functools
import io
import logging
import threading
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import trio

from . import kubo_replies as replies
from .blocks import StoreSize, check
from .cid import Codec, cid_of, cid_text, parse_cid, split, verify
from .kubo_address import endpoint, is_private

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Threads, and so questions at once. Each has its own client, whose session is no other's.
THREADS = 4
#: Bytes of a reply. The largest are a block and the list of what is pinned.
MAX_REPLY = 16 * 1024 * 1024
_TOO_LONG = f"an answer of more than {MAX_REPLY} bytes"
#: The share of the time limit after which the daemon itself is told to give up: so it says that it
#: does not have a block before the limit makes a fault of that.
DAEMONS_SHARE = 0.5

#: A block lies under its digest, whatever codec it is put with. With `raw` nothing is read into
#: it, and it is the only one that Kubo takes by both names at once; older daemons know `format`.
_PUT = {
    "cid-codec": "raw",
    "format": "raw",
    "version": "1",
    "mhtype": "sha2-256",
    "allow-big-block": "true",
}
#: By what names a block of ours may be pinned.
_PINNED: tuple[Codec, ...] = ("dag-cbor", "raw")


#: A thread that waits for ever keeps one token of the limiter, and nobody waiting.
_LEAVE_BEHIND: dict[str, Any] = {"abandon_on_cancel": True}


class KuboError(Exception):
    """The daemon could not be asked, or its answer makes no sense. The message says why."""


class KuboRefused(KuboError):
    """The daemon understood, and said no: mostly because it does not have the block."""


class KuboLacks(KuboError):
    """There is no such command: it is another program, or an older one."""


class KuboBlocks:
    """A `BlockStore` in a Kubo daemon. Its `size` is that of the daemon's whole repository."""

    def __init__(self, api: str, *, timeout: float = 5.0) -> None:
        """`api` is the address of its RPC; `timeout` (s) the limit of each question.

        Raises `ValueError` for what is no such address.
        """
        self._endpoint = endpoint(api)
        self._timeout = timeout
        self._patience = {"timeout": f"{max(1, int(timeout * DAEMONS_SHARE * 1000))}ms"}
        self._threads = threading.local()
        self._limiter = trio.CapacityLimiter(THREADS)
        #: What failed last; empty while the daemon works.
        self.problem = ""

    @property
    def url(self) -> str:
        """Where the daemon is, for people."""
        return self._endpoint.url

    # --- the store ------------------------------------------------------------------------------

    async def put(self, cid: bytes, block: bytes) -> bool:
        check(cid, block)
        opts = {**_PUT, **self._patience}

        def kept(reply: Any) -> bool:
            name = replies.read(reply, replies.Block).Key
            if split(parse_cid(name))[1] != split(cid)[1]:
                raise ValueError(f"it says {name[:100]} to what is {cid_text(cid)}")
            return True

        asked = self._call(lambda client: client.block.put(io.BytesIO(block), opts=opts))
        # There is no block that a sound daemon refuses: it is full, or may not write.
        return await self._attempt("put a block", asked, kept, False, refusal_is_fault=True)

    async def get(self, cid: bytes) -> bytes | None:
        name = _name(cid)
        if not name:
            return None

        def checked(block: Any) -> bytes:
            if not isinstance(block, bytes) or not verify(cid, block):
                raise ValueError(f"the bytes are not what {name} names")
            return block

        asked = self._call(lambda client: client.block.get(name, offline=True, opts=self._patience))
        return await self._attempt("get a block", asked, checked, None)

    async def has(self, cid: bytes) -> bool:
        name = _name(cid)
        if not name:
            return False
        asked = self._call(
            lambda client: client.block.stat(name, offline=True, opts=self._patience)
        )
        return await self._attempt(
            "look for a block", asked, lambda r: replies.there(r, replies.Block), False
        )

    async def delete(self, cid: bytes) -> bool:
        name = _name(cid)
        if not name:
            return False
        await self._unpin(cid)

        def gone(body: Any) -> bool:
            return not msgspec.json.decode(body, type=replies.Removed).Error

        asked = self._call(self._lacking("block/rm", name))
        return await self._attempt("delete a block", asked, gone, False)

    async def pin(self, cid: bytes, pinned: bool = True) -> bool:
        name = _name(cid)
        if not name:
            return False
        if not pinned:
            await self._unpin(cid)
            return await self.has(cid)
        asked = self._call(lambda client: client.pin.add(name, offline=True, opts=self._patience))
        return await self._attempt(
            "pin a block", asked, lambda r: replies.there(r, replies.Pins), False
        )

    async def size(self) -> StoreSize:
        def read(both: Any) -> StoreSize:
            repository, pins = (
                replies.read(both[0], replies.Repository),
                replies.read(both[1], replies.PinList),
            )
            return StoreSize(repository.NumObjects, repository.RepoSize, len(pins.Keys))

        asked = self._call(lambda client: (client.repo.stat(), client.pin.ls(type="recursive")))
        return await self._attempt("count blocks", asked, read, StoreSize(0, 0, 0))

    async def _unpin(self, cid: bytes) -> None:
        """Take every pin off it; a pin is of one name of a block."""
        codec, digest = split(cid)
        for name in {cid_text(cid_of(digest, each)) for each in (codec, *_PINNED)}:
            asked = self._call(functools.partial(_unpinned, name=name, opts=self._patience))
            await self._attempt("unpin a block", asked, lambda reply: None, None)

    # --- whom it tells --------------------------------------------------------------------------

    async def exposure(self) -> str:
        """Why the daemon may be on the public network; empty if it shows that it is not.

        Raises `KuboError` if it cannot be asked.
        """

        def ask(client: Any) -> tuple[Any, ...]:
            return client.bootstrap.list(), client.swarm.peers(), client.id()

        try:
            bootstrap, peers, identity = await self._call(ask)
        except (KuboRefused, KuboLacks) as error:
            return f"it does not tell: {error}"
        try:
            known = replies.read(bootstrap, replies.Bootstrap).Peers or ()
            connected = [peer.Addr for peer in replies.read(peers, replies.Peers).Peers or ()]
            listening = [
                *(replies.read(identity, replies.Identity).Addresses or ()),
                *await self._listening(),
            ]
        except ValueError as error:
            raise KuboError(f"its answer makes no sense: {error}") from error
        self.problem = ""
        if known:
            return f"its Bootstrap list is not empty ({len(known)} in it)"
        for what, addresses in (("is connected to", connected), ("listens on", listening)):
            for address in addresses:
                if not is_private(address):
                    return f"it {what} {address[:200] or 'an address that it does not tell'}"
        return ""

    async def _listening(self) -> tuple[str, ...]:
        """Its interfaces; js-ipfs, which cannot say, tells all that it has with its identity."""
        try:
            body = await self._call(self._lacking("swarm/addrs/listen"))
        except (KuboRefused, KuboLacks):
            return ()
        return msgspec.json.decode(body, type=replies.Strings).Strings or ()

    # --- asking ---------------------------------------------------------------------------------

    async def _attempt(
        self,
        what: str,
        asked: Awaitable[Any],
        read: Callable[[Any], T],
        otherwise: T,
        *,
        refusal_is_fault: bool = False,
    ) -> T:
        """What is read from the reply; after a refusal or a fault `otherwise`."""
        try:
            reply = await asked
            try:
                result = read(reply)
            except ValueError as error:
                raise KuboError(f"its answer makes no sense: {error}") from error
        except KuboError as error:
            if isinstance(error, KuboRefused) and not refusal_is_fault:
                logger.debug("the Kubo at %s did not %s: %s", self.url, what, error)
                self.problem = ""
                return otherwise
            if not self.problem:
                logger.warning("the Kubo at %s did not %s: %s", self.url, what, error)
            self.problem = str(error)
            return otherwise
        self.problem = ""
        return result

    def _lacking(self, command: str, *arguments: str) -> Callable[[Any], bytes]:
        """What asks for a command that the library lacks."""
        url = f"{self._endpoint.url}/api/v0/{command}"
        return lambda client: _post(url, arguments, self._timeout)

    async def _call(self, ask: Callable[[Any], Any]) -> Any:
        """Ask by the library. Raises `KuboError`."""
        with trio.move_on_after(self._timeout):
            return await trio.to_thread.run_sync(
                self._in_thread, ask, limiter=self._limiter, **_LEAVE_BEHIND
            )
        raise KuboError(f"no answer within {self._timeout:g} s")

    def _in_thread(self, ask: Callable[[Any], Any]) -> Any:
        try:
            import ipfshttpclient
        except ImportError as error:
            raise KuboError("ipfshttpclient is missing: install `promptmesh[kubo]`") from error
        client = getattr(self._threads, "client", None)
        try:
            if client is None:
                client = self._threads.client = _client(self._endpoint.multiaddr, self._timeout)
            return ask(client)
        except KuboError:
            raise
        except ipfshttpclient.exceptions.ErrorResponse as error:
            raise KuboRefused(_sentence(error)) from error
        except ipfshttpclient.exceptions.StatusError as error:
            raise _refusal(error.original.response.status_code, b"") from error
        except Exception as error:  # whatever bytes make of the library; the log says it
            if client is not None:
                client.close()
            self._threads.client = None
            raise KuboError(_sentence(error)) from error


# --- the library --------------------------------------------------------------------------------


def _client(multiaddr: str, timeout: float) -> Any:
    """A client with what it lacks: bounded replies, no redirects, no proxy of the environment."""
    import ipfshttpclient

    # By `requests`, said at each call; urllib3 3, which would fail, is not taken.
    warnings.filterwarnings("ignore", "The 'strict' parameter", FutureWarning)
    client = ipfshttpclient.Client(multiaddr, session=True, timeout=timeout)
    session = client._client._session
    session.trust_env = False
    session.max_redirects = 0
    session.hooks["response"] = [_bounded]
    return client


def _bounded(response: Any, **_: Any) -> None:
    """Read the body before the library does, which would take any length."""
    try:
        body = response.raw.read(MAX_REPLY + 1, decode_content=True)
    except BaseException:
        response.close()
        raise
    if len(body) > MAX_REPLY:
        response.close()
        raise KuboError(_TOO_LONG)
    response._content, response._content_consumed = body, True


def _post(url: str, arguments: Sequence[str], timeout: float) -> bytes:
    """Ask by `httpx`. Raises `KuboError`, or an error of the library's."""
    import httpx

    secure = url.startswith("https:")  # reading the system's certificates takes 20 ms
    body = bytearray()
    with (
        httpx.Client(trust_env=False, timeout=timeout, verify=secure) as client,
        client.stream("POST", url, params={"arg": list(arguments)}) as response,
    ):
        for piece in response.iter_bytes():
            body += piece
            if len(body) > MAX_REPLY:
                raise KuboError(_TOO_LONG)
    if response.status_code != 200:
        raise _refusal(response.status_code, bytes(body))
    return bytes(body)


def _unpinned(client: Any, *, name: str, opts: Mapping[str, str]) -> Any:
    return client.pin.rm(name, opts=opts)


def _refusal(status: int, body: bytes) -> KuboError:
    try:
        return KuboRefused(msgspec.json.decode(body, type=replies.No).Message[:500])
    except ValueError:
        kind = KuboLacks if status == 404 else KuboError
        return kind(f"it answered with the status {status}")


def _sentence(error: Exception) -> str:
    """Why, without the library's wrappings."""
    text = str(error) or type(error).__name__
    for word, plain in (("refused", "nothing listens there"), ("timed out", "it did not answer")):
        if word in text and "HTTPConnectionPool" in text:
            return plain
    return text[:300]


def _name(cid: bytes) -> str:
    """What the daemon calls a block; empty for a CID that we do not use."""
    try:
        split(cid)
    except ValueError:
        return ""
    return cid_text(cid)
