"""How a node ends that cannot go on."""

import socket
import subprocess
import sys
from pathlib import Path

#: A node that has a fault in a task of its own, as soon as it is up.
FAULTY = """
import sys
from promptmesh.node import daemon
from promptmesh.node.cli import main

read, up = daemon.read_machine, []

def read_machine(gpus):
    if up:
        raise OSError(5, "a fault of this machine")
    return read(gpus)

daemon.read_machine = read_machine
daemon.MACHINE_PERIOD = 0.0
daemon._spare_the_collector = lambda: up.append(True)  # the last step of the start
sys.exit(main(["--home", sys.argv[1], "up", "--http", sys.argv[2]]))
"""
ALONE = "[mesh]\nenabled = false\n[local_servers]\nenabled = false\n"


def end_of(home: Path, http: str) -> subprocess.CompletedProcess[str]:
    """A faulty node, run to its end."""
    home.mkdir()
    (home / "config.toml").write_text(ALONE)
    command = [sys.executable, "-c", FAULTY, str(home), http]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


def test_a_fault_after_the_start_is_shown_whole(tmp_path: Path) -> None:
    ended = end_of(tmp_path / "home", "127.0.0.1:0")
    assert ended.returncode == 1
    assert "is up: http://127.0.0.1:" in ended.stderr
    assert "cannot start" not in ended.stderr
    assert "in read_machine" in ended.stderr
    assert "a fault of this machine" in ended.stderr


def test_what_keeps_it_from_starting_is_a_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = end_of(tmp_path / "home", f"127.0.0.1:{port}")
    assert ended.returncode == 1
    assert f"the node cannot start: cannot listen on 127.0.0.1:{port}: " in ended.stderr
    assert "Traceback" not in ended.stderr
