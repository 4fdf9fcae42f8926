"""The Python API in programs of their own: what importing costs, forks, Ctrl-C, the end."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from fakes_openrouter import vendor

#: Modules that `from promptmesh import ...` must not load.
HEAVY = "trio asyncio sqlite3 httpx cryptography libp2p torch transformers cbrrr msgpack"


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(("PROMPTMESH", "IPFS"))}
    return kept | {"PROMPTMESH_HOME": str(tmp_path / "home")} | more


def run(tmp_path: Path, code: str, **more: str) -> str:
    """What a program prints. It must end."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=environment(tmp_path, **more),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def test_importing_does_no_work(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        f"""
        import sys, threading, time
        before, started = set(sys.modules), time.process_time()
        import promptmesh
        bare = set(sys.modules) - before
        from promptmesh import *
        spent = time.process_time() - started
        new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
        print(sorted(name for name in bare if "promptmesh" in name))
        print(sorted(new & set({HEAVY.split()!r})))
        print(threading.active_count(), spent < 5, len(set(sys.modules) - before) < 250)
        """,
    )
    assert out.splitlines() == ["['promptmesh']", "[]", "1 True True"]
    assert not (tmp_path / "home").exists()


def test_a_forked_child_has_a_loop_of_its_own(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        import os, sys
        from promptmesh import generate_text, get_last_generation_trace, get_default_router_deps
        assert generate_text("a", provider="echo") == "a"
        child = os.fork()
        if not child:
            assert generate_text("a", provider="echo") == "a"
            assert get_last_generation_trace()["cache"] == "hit-local"
            assert generate_text("b", provider="echo") == "b"
            get_default_router_deps().close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        # The child took nothing of the parent's along when it ended.
        assert generate_text("b", provider="echo") == "b"
        print(get_last_generation_trace()["cache"])
        """,
    )
    assert out == "hit-local\n"


def test_a_forked_child_keeps_its_answers_when_the_parent_closes(tmp_path: Path) -> None:
    """Of a file that was open when it forked, SQLite believes the child has the parent's locks."""
    out = run(
        tmp_path,
        """
        import os, sqlite3
        from promptmesh import generate_text, get_default_router_deps
        generate_text("a", provider="echo")
        from_child, to_child = os.pipe(), os.pipe()
        child = os.fork()
        if not child:
            generate_text("b", provider="echo")
            os.write(from_child[1], b"x")
            os.read(to_child[0], 1)
            generate_text("c", provider="echo")
            get_default_router_deps().close()
            os._exit(0)
        os.read(from_child[0], 1)
        generate_text("d", provider="echo")  # it goes on with what was closed for the fork
        get_default_router_deps().close()
        os.write(to_child[1], b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for name, sql in (
            ("cache", "SELECT count(*) FROM answer"),
            ("node", "SELECT sum(requests) FROM usage"),
        ):
            file = sqlite3.connect(f"{os.environ['PROMPTMESH_HOME']}/{name}.sqlite")
            print(*file.execute(sql).fetchone())
            file.close()
        """,
    )
    assert out == "4\n4\n"


def test_a_fork_waits_until_the_loop_is_between_two_steps(tmp_path: Path) -> None:
    """What a step holds, such as a lock of SQLite's, a child would find locked for ever."""
    out = run(
        tmp_path,
        """
        import os, threading, time
        from contextlib import asynccontextmanager
        from promptmesh.node.loop_thread import LoopThread

        @asynccontextmanager
        async def opens():
            yield None

        async def step(_):
            with lock:
                begun.set()
                time.sleep(0.5)  # what takes long

        lock, begun = threading.Lock(), threading.Event()
        thread = LoopThread(opens, "loop")
        job = thread.submit(step)
        begun.wait()
        child = os.fork()
        if not child:
            os._exit(lock.locked())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        job.future.result()
        thread.submit(step).future.result()  # it goes on
        thread.close()
        os.waitpid(os.fork() or os._exit(0), 0)  # nor does it matter that it has ended
        print("done")
        """,
    )
    assert out == "done\n"


def test_ctrl_c_cancels_the_work(tmp_path: Path) -> None:
    with vendor() as server:
        server.hang = True
        process = subprocess.Popen(
            [
                *(sys.executable, "-c"),
                "from promptmesh import generate_text\n"
                "try: generate_text('a b', provider='openrouter')\n"
                "except KeyboardInterrupt: print('stopped', flush=True)\n"
                "input()\n",
            ],
            env=environment(
                tmp_path, OPENROUTER_API_KEY="k", PROMPTMESH_OPENROUTER_BASE_URL=server.url
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert server.begun.wait(120)
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "stopped\n"
            # The program lives on, and the work does not.
            assert server.left.wait(60)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.wait(120) == 0
        finally:
            process.kill()
            process.communicate()


def test_a_program_ends_after_what_it_began_has_ended(tmp_path: Path) -> None:
    """Such as a model's process, which takes a moment."""
    out = run(
        tmp_path,
        """
        import atexit, threading

        @atexit.register  # before the router's own, so it is called after that
        def over():
            print(ended, [t.name for t in threading.enumerate() if t.name == "promptmesh"])

        import trio
        from promptmesh import generate_text
        from promptmesh.providers.echo import Echo

        class SlowToEnd(Echo):
            async def run(self):
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await trio.sleep(0.5)
                    ended.append(True)

        ended = []
        generate_text("a", provider_instance=SlowToEnd())
        """,
    )
    assert out == "[True] []\n"


def test_a_program_ends_although_a_class_of_it_hangs(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        import threading
        from promptmesh import generate_text
        class Hangs:
            def generate(self, prompt, **kwargs):
                threading.Event().wait()
        try:
            generate_text("a", provider_instance=Hangs(), timeout=0.2)
        except RuntimeError as error:
            print(error)
        """,
    )
    assert out == "there was no whole answer within 0.2 s\n"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_a_worker_of_multiprocessing_spent_is_counted(tmp_path: Path, method: str) -> None:
    """Such a process ends without what `atexit` knows."""
    (tmp_path / "program.py").write_text(
        "import multiprocessing, os, sqlite3\n"
        "from promptmesh import generate_text\n"
        "def ask(): generate_text('a', provider='echo')\n"
        "if __name__ == '__main__':\n"
        "    generate_text('a', provider='echo', use_cache=False)\n"
        f"    context = multiprocessing.get_context({method!r})\n"
        "    worker = context.Process(target=ask)\n"
        "    worker.start()\n"
        "    worker.join()\n"
        "    path = os.path.join(os.environ['PROMPTMESH_HOME'], 'node.sqlite')\n"
        "    rows = sqlite3.connect(path).execute('SELECT requests, cache FROM usage')\n"
        "    print(worker.exitcode, [row for row in rows if row[1] != 'bypass'])\n"
    )
    out = run(tmp_path, "import runpy; runpy.run_path('program.py', run_name='__main__')")
    assert out == "0 [(1, 'miss')]\n"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_with_multiprocessing(tmp_path: Path, method: str) -> None:
    (tmp_path / "program.py").write_text(
        "import multiprocessing\n"
        "from promptmesh import generate_text\n"
        "def ask(prompt): return generate_text(prompt, provider='echo')\n"
        "if __name__ == '__main__':\n"
        "    ask('z')\n"
        f"    context = multiprocessing.get_context({method!r})\n"
        "    with context.Pool(2) as pool: print(pool.map(ask, ['a', 'b', 'c', 'a']))\n"
    )
    out = run(tmp_path, "import runpy; runpy.run_path('program.py', run_name='__main__')")
    assert out == "['a', 'b', 'c', 'a']\n"
