"""The node's folder: identity, mesh secret, known peers, the running node's address, the lock.

Files that hold a secret are made with mode 600 and appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..mesh.swarm_key import KEY_SIZE, format_swarm_key, parse_swarm_key
from .addresses import check_dialable

logger = logging.getLogger(__name__)

IDENTITY_BYTES = 32
#: What to say to who needs a running node.
NOT_RUNNING = "no node runs here: start one with `promptmesh up`"
#: Of any of the small files here; what is larger was not written by us.
_MAX_FILE_BYTES = 1 << 20
#: No epoch is so great: what peers accept, and room to rise.
MAX_EPOCH = 2**52
MAX_PEERS = 256
MAX_ADDRESSES_PER_PEER = 16


class HomeError(Exception):
    """A file of the node's folder is wrong, missing or not writable. The message says which."""


class HomeInUse(HomeError):
    """Another node runs on this folder."""


@dataclass(frozen=True)
class Running:
    """The node that runs on a folder. `http` is HOST:PORT."""

    pid: int
    http: str


@dataclass(frozen=True)
class KnownPeers:
    """Where to look for the mesh: what `join` stored, and the peers seen, the latest first."""

    #: Multiaddrs with `/p2p/ID`.
    bootstrap: tuple[str, ...] = ()
    #: Peer id -> multiaddrs with `/p2p/ID`.
    peers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.bootstrap or self.peers)


class Home:
    """The folder and its files. Nothing is made or read before a method is called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.toml"
        self.identity_path = path / "identity.key"
        self.swarm_key_path = path / "swarm.key"
        self.peers_path = path / "peers.json"
        self.epoch_path = path / "epoch"
        self.node_path = path / "node.json"
        self.lock_path = path / "lock"
        self.cache_path = path / "cache.sqlite"
        self.database_path = path / "node.sqlite"

    def __repr__(self) -> str:
        return f"Home({str(self.path)!r})"

    # --- making it ------------------------------------------------------------------------------

    def make(self, config_text: str) -> list[str]:
        """Make what is missing: folder, identity, a new mesh, the configuration.

        Gives the names of the files made. Two at once do no harm. Raises `HomeError`.
        """
        self._make_folder()
        wanted = {
            self.identity_path: secrets.token_bytes(IDENTITY_BYTES),
            self.swarm_key_path: format_swarm_key(secrets.token_bytes(KEY_SIZE)).encode(),
            self.config_path: config_text.encode(),
        }
        return [path.name for path, data in wanted.items() if _write_new(path, data)]

    def make_identity(self) -> None:
        """Be a peer, so far without a mesh and a configuration. Raises `HomeError`."""
        self._make_folder()
        _write_new(self.identity_path, secrets.token_bytes(IDENTITY_BYTES))

    def _make_folder(self) -> None:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise HomeError(f"{self.path} cannot be made: {error.strerror}") from None

    # --- the secrets ----------------------------------------------------------------------------

    def identity(self) -> bytes:
        """The 32-byte Ed25519 seed. Raises `HomeError`."""
        seed = _read(self.identity_path, "run `promptmesh init` to make one")
        if len(seed) != IDENTITY_BYTES:
            raise HomeError(
                f"{self.identity_path} has {len(seed)} bytes instead of {IDENTITY_BYTES}: it is "
                "damaged. Bring it back from a copy, or remove it to become a new peer"
            )
        return seed

    def peer_id(self) -> str:
        """This node's peer id, as libp2p derives it from the identity. Raises `HomeError`."""
        from ..mesh.identity import Identity  # cryptography, which few commands need

        return Identity(self.identity()).peer_id

    def swarm_key(self) -> bytes:
        """The 32-byte mesh secret. Raises `HomeError`."""
        data = _read(self.swarm_key_path, "run `promptmesh init` to make a mesh")
        try:
            return parse_swarm_key(data.decode("ascii"))
        except ValueError as error:  # says what such a file looks like, and never shows the key
            raise HomeError(f"{self.swarm_key_path} is not a libp2p swarm key: {error}") from None

    def write_swarm_key(self, key: bytes) -> None:
        """Be in the mesh of that secret from the next start on. Raises `HomeError`."""
        _write(self.swarm_key_path, format_swarm_key(key).encode())

    def forget_mesh(self) -> None:
        """Be alone in a new mesh. Raises `HomeError`."""
        self.write_swarm_key(secrets.token_bytes(KEY_SIZE))
        self.peers_path.unlink(missing_ok=True)

    def warnings(self) -> list[str]:
        """Sentences about secrets that other users of the machine can read."""
        found = []
        for path in (self.identity_path, self.swarm_key_path):
            with contextlib.suppress(OSError):
                mode = path.stat().st_mode & 0o777
                if mode & 0o077:
                    found.append(
                        f"other users can read {path} (mode {mode:03o}); type: chmod 600 '{path}'"
                    )
        return found

    # --- the peers ------------------------------------------------------------------------------

    def known_peers(self) -> KnownPeers:
        """What is known of the mesh. A damaged file is logged and counts as empty."""
        try:
            fields = json.loads(_read(self.peers_path, ""))
            return KnownPeers(
                bootstrap=_addresses(fields.get("bootstrap")),
                peers=_peers(fields.get("peers")),
            )
        except HomeError:
            return KnownPeers()
        except (ValueError, AttributeError, RecursionError) as error:
            logger.warning("%s is damaged and not used: %s", self.peers_path, error)
            return KnownPeers()

    def write_known_peers(self, known: KnownPeers) -> None:
        """Keep the first `MAX_PEERS` of them. Raises `HomeError`."""
        peers = {
            peer: list(addresses[:MAX_ADDRESSES_PER_PEER])
            for peer, addresses in list(known.peers.items())[:MAX_PEERS]
        }
        fields = {"bootstrap": list(known.bootstrap[:MAX_PEERS]), "peers": peers}
        _write(self.peers_path, json.dumps(fields, indent=1).encode())

    def next_epoch(self, now: int) -> int:
        """A number for this start that is greater than that of each one before.

        It is the time in milliseconds (`now`), but for a clock that has gone back since: others
        would take what the node says for older than what they know of it. Where the file cannot be
        used, that is logged, and it is the time.
        """
        last = -1
        if self.epoch_path.exists():
            with contextlib.suppress(HomeError, ValueError):
                last = int(_read(self.epoch_path, ""))
            if not 0 <= last < MAX_EPOCH:
                logger.warning("%s is damaged and not used", self.epoch_path)
                last = -1
        epoch = max(now, last + 1)
        try:
            _write(self.epoch_path, str(epoch).encode())
        except HomeError as error:
            logger.warning("the number of this start is not remembered: %s", error)
        return epoch

    # --- the running node -----------------------------------------------------------------------

    def running(self) -> Running | None:
        """The node that runs on this folder, as far as its file says; None if its process ended."""
        try:
            fields = json.loads(_read(self.node_path, ""))
            pid, http = fields["pid"], fields["http"]
        except (HomeError, ValueError, KeyError, TypeError, RecursionError):
            return None
        if not isinstance(pid, int) or not isinstance(http, str) or not _is_alive(pid):
            return None
        return Running(pid, http)

    @contextlib.contextmanager
    def announced(self, http: str) -> Iterator[None]:
        """While inside, other programs find this process at `http` (HOST:PORT)."""
        _write(self.node_path, json.dumps({"pid": os.getpid(), "http": http}).encode())
        try:
            yield
        finally:
            self.node_path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """While inside, no other process may run a node on this folder. Raises `HomeInUse`."""
        import fcntl

        try:
            descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HomeError(f"{self.lock_path} cannot be made: {error.strerror}") from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise HomeInUse(self._in_use()) from None
            # Who held it before may have been killed without tidying up.
            self.node_path.unlink(missing_ok=True)
            yield
        finally:
            # The file stays: to remove it would let two processes lock two files of one name.
            os.close(descriptor)

    def _in_use(self) -> str:
        running = self.running()
        who = f" (process {running.pid}, http://{running.http})" if running else ""
        return (
            f"a node runs on {self.path} already{who}. Stop it first, or give this one a folder of "
            "its own with --home"
        )


def _addresses(value: Any) -> tuple[str, ...]:
    """The addresses of a list that can be dialled; others are left out."""
    found = []
    for address in value[:MAX_PEERS] if isinstance(value, list) else []:
        with contextlib.suppress(ValueError):
            if isinstance(address, str):
                found.append(check_dialable(address))
    return tuple(found)


def _peers(value: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict):
        return {}
    found = {peer: _addresses(addresses) for peer, addresses in list(value.items())[:MAX_PEERS]}
    return {peer: addresses for peer, addresses in found.items() if addresses}


def _is_alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:  # it lives, and belongs to somebody else
        return True
    except (OSError, OverflowError):
        return False
    return True


def _read(path: Path, hint: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES)
    except FileNotFoundError:
        raise HomeError(f"{path} is missing: {hint}") from None
    except OSError as error:
        raise HomeError(f"{path} cannot be read: {error.strerror}") from None


def _write(path: Path, data: bytes) -> None:
    """Put the file in place of the old one, whole or not at all. Raises `HomeError`."""
    try:
        with _scratch(path, data) as scratch:
            os.replace(scratch, path)
    except OSError as error:
        raise HomeError(f"{path} cannot be written: {error.strerror}") from None


def _write_new(path: Path, data: bytes) -> bool:
    """Make the file if there is none; False if there is. Raises `HomeError`."""
    if path.exists():
        return False
    try:
        with _scratch(path, data) as scratch:
            # Unlike a rename, a link never takes the place of a file that another process made.
            os.link(scratch, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise HomeError(f"{path} cannot be written: {error.strerror}") from None
    return True


@contextlib.contextmanager
def _scratch(path: Path, data: bytes) -> Iterator[Path]:
    """The data on disk beside `path`, readable by its owner only; removed at the end."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
