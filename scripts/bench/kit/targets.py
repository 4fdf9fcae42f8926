"""Systems under test: started, loaded in rounds, measured, and compared by ratios.

The gateways share one core; what asks them and what they ask share the other. A figure of a busy
machine says little, so a ratio is the median of the rounds' ratios, and each round measures all
systems one after the other.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
KIT = Path(__file__).resolve().parent
WORK = ROOT / "build" / "bench"
BACKEND_PORT = 9090
BACKEND = f"http://127.0.0.1:{BACKEND_PORT}"
GATEWAY_CPU, LOAD_CPU = "0", "1"
TICKS = os.sysconf("SC_CLK_TCK")
LITELLM = "litellm[proxy]==1.106.2"
LITELLM_PORT = 9121

LITELLM_CONFIG = f"""\
model_list:
  - model_name: fake-model
    litellm_params: {{model: openai/fake-model, api_base: {BACKEND}/v1, api_key: sk-fake}}
litellm_settings:
  telemetry: false
  num_retries: 0
  request_timeout: 60
"""
PROVIDER = f"""\
[[providers]]
kind = "openai_compatible"
name = "fake"
base_url = "{BACKEND}/v1"
models = ["fake-model"]
slots = 64
"""


@dataclass
class Target:
    """A system under test: its processes, and the port it answers on."""

    name: str
    port: int
    commands: Sequence[Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def pids(self) -> list[int]:
        return [pid for process in self.processes for pid in _tree(process.pid)]

    def start(self) -> None:
        log = (WORK / f"{self.name}.log").open("ab")
        for command in self.commands:
            self.processes.append(
                subprocess.Popen(
                    ["taskset", "-c", GATEWAY_CPU, *command],
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **self.environment},
                    start_new_session=True,
                )
            )
            time.sleep(0.5)
        self._wait_until_it_answers()

    def stop(self) -> None:
        for process in self.processes:
            os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)

    def _wait_until_it_answers(self) -> None:
        give_up = time.monotonic() + 120
        while True:
            try:
                ask(self.port, "ready? [[n=1]]")
                return
            except OSError as error:
                if time.monotonic() > give_up or any(p.poll() is not None for p in self.processes):
                    sys.exit(f"{self.name} did not start: {error}; see {WORK}/{self.name}.log")
                time.sleep(0.1)


def ask(port: int, prompt: str) -> None:
    """One chat completion. Raises `OSError`."""
    body = {"model": "fake-model", "messages": [{"role": "user", "content": prompt}]}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=5):
        pass


def read_json(port: int, path: str) -> Any:
    """A JSON document. Raises `OSError`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
        return json.load(response)


@contextmanager
def running(targets: Sequence[Target]) -> Iterator[None]:
    """The fake backend and the targets, for as long as they are measured."""
    WORK.mkdir(parents=True, exist_ok=True)
    build_kit()
    with ExitStack() as stack:
        backend = subprocess.Popen(
            ["taskset", "-c", LOAD_CPU, str(WORK / "fakellm"), "-p", str(BACKEND_PORT), "-q"]
        )
        stack.callback(backend.terminate)
        for target in targets:
            stack.callback(target.stop)
            target.start()
        yield


# --- making what is needed ----------------------------------------------------------------------


def build_kit() -> None:
    """The backend and the load generator."""
    for name in ("fakellm", "llmload"):
        out, source = WORK / name, KIT / f"{name}.c"
        if not out.exists() or out.stat().st_mtime < source.stat().st_mtime:
            subprocess.run(["gcc", "-O2", "-o", str(out), str(source)], check=True)


def foreign_program(name: str, requirement: str) -> str:
    """The program of a foreign gateway, in an environment of its own."""
    venv = WORK / "venvs" / name
    program = venv / "bin" / name
    if not program.exists():
        print(f"installing {requirement}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(venv / "bin" / "pip"), "install", "-q", requirement], check=True)
    return str(program)


def litellm(name: str = "litellm", settings: str = "") -> Target:
    """LiteLLM; `settings` are lines of YAML that belong to its `litellm_settings`."""
    WORK.mkdir(parents=True, exist_ok=True)
    config = WORK / f"{name}.yaml"
    config.write_text(LITELLM_CONFIG + settings)
    address = f"--config {config} --host 127.0.0.1 --port {LITELLM_PORT}"
    return Target(
        name,
        LITELLM_PORT,
        [[foreign_program("litellm", LITELLM), *address.split()]],
        {
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_LOG": "ERROR",
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
            "NO_PROXY": "*",
        },
    )


def one_node(name: str, port: int, *, member: bool = False) -> Target:
    """A node with the fake backend, alone: in no mesh, or a mesh's only member."""
    command = _node_command(name, port, PROVIDER)
    if member:
        _promptmesh(name, "init")
    return Target(name, port, [command])


def two_nodes(name: str, port: int) -> Target:
    """Two nodes of one mesh: the one that is asked, and a port above it the one that computes."""
    serving = _node_command(f"{name}-peer", port + 1, PROVIDER)
    entry = _node_command(f"{name}-entry", port, "")
    _promptmesh(f"{name}-peer", "init")
    link = json.loads(_promptmesh(f"{name}-peer", "invite", "--json"))["link"]
    _promptmesh(f"{name}-entry", "join", "-", stdin=link)
    return Target(name, port, [serving, entry])


def _node_command(name: str, http: int, config: str) -> list[str]:
    """A node with a fresh home; its mesh port is ten above that of HTTP."""
    home = WORK / "homes" / name
    subprocess.run(["rm", "-rf", str(home)], check=True)
    home.mkdir(parents=True)
    (home / "config.toml").write_text(
        f'[node]\nname = "{name}"\n[http]\nlisten = "127.0.0.1:{http}"\n'
        f'[mesh]\nmdns = false\nlisten = ["/ip4/127.0.0.1/tcp/{http + 10}"]\n{config}'
    )
    return [str(ROOT / ".venv" / "bin" / "promptmesh"), "--home", str(home), "up"]


def _promptmesh(name: str, *arguments: str, stdin: str = "") -> str:
    program = str(ROOT / ".venv" / "bin" / "promptmesh")
    home = str(WORK / "homes" / name)
    return subprocess.run(
        [program, "--home", home, *arguments],
        input=stdin,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what to do next
        text=True,
    ).stdout


# --- measuring ----------------------------------------------------------------------------------


def _tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += _tree(int(child))
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def memory_mb(pids: Sequence[int]) -> float:
    """Proportional set size, so that shared pages count once."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def run_load(target: Target, options: str, directive: str, port: int = 0) -> dict[str, Any]:
    """What llmload says, and `cpu_us`, the CPU of all processes of the target for each request."""
    command = [str(WORK / "llmload"), "-p", str(port or target.port), *options.split()]
    before = cpu_seconds(target.pids())
    done = subprocess.run(
        ["taskset", "-c", LOAD_CPU, *command, "-o", directive],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    warm_up = int(options.split()[options.split().index("-w") + 1]) if "-w" in options else 0
    requests = result["requests"] + warm_up
    result["cpu_us"] = (cpu_seconds(target.pids()) - before) / max(1, requests) * 1e6
    if result["errors"]:
        print(f"{target.name} {options}: {result['errors']} errors", file=sys.stderr)
    return result


def turned(targets: Sequence[Target], number: int) -> list[Target]:
    """The targets in the order of that round: each begins in its turn."""
    turn = number % len(targets)
    return [*targets[turn:], *targets[:turn]]


def ratio_text(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the rounds' ratios, lowest and highest."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True) if b)
    return f"{statistics.median(ratios):9.3f}  ({ratios[0]:.3f} to {ratios[-1]:.3f})"
