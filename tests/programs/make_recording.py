"""Runs a vendor's real CLI, and writes down what it says (`recordings`).

`make_recording.py PROGRAM FOLDER ARGUMENT...`. A signal reaches the real one as well, which is in
the same group; this one waits for it.
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).parent.parent))

from recordings import KEPT, WRITES, Normal, Recording, case_of, places, written_to


def main() -> None:
    program, folder, *argv = sys.argv[1:]
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    child = subprocess.Popen(
        [program, *argv], stdin=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    lines: list[tuple[str, str]] = []

    def pass_on(name: str, source: IO[bytes], target: IO[bytes]) -> None:
        for line in source:
            if not told:  # what it says of its end is nobody's business any more
                lines.append((name, line.decode("utf-8", "surrogateescape")))
            target.write(line)
            target.flush()

    readers = [
        threading.Thread(target=pass_on, args=("out", child.stdout, sys.stdout.buffer)),
        threading.Thread(target=pass_on, args=("err", child.stderr, sys.stderr.buffer)),
    ]
    for reader in readers:
        reader.start()
    code = child.wait()
    for reader in readers:
        reader.join()
    code = 128 - code if code < 0 else code
    home = str(Path(program).resolve().parent)  # it may say where it has failed
    normal = Normal([*places(os.environ), (home, "/opt/cli")])
    lines.sort(key=lambda line: line[0], reverse=True)  # which stream was first is chance
    recording = Recording(
        tuple(map(normal, argv)),
        tuple((stream, normal(line)) for stream, line in lines),
        None if told else code,
        {name: normal(text) for name in WRITES if (text := written(argv, name))},
        code if told else None,
    )
    (Path(folder) / f"{case_of(argv, os.environ)}.jsonl").write_text(recording.dump())
    sys.exit(code)


def written(argv: list[str], name: str) -> str:
    path = written_to(name, argv, os.environ)
    if path is None or not path.exists():
        return ""
    text = path.read_text()
    return KEPT[name](text) if name in KEPT else text


main()
