"""Stands in for a vendor's CLI: says what the real one said in this case (`recordings`).

`play_recording.py FOLDER ARGUMENT...`. It reads its input to the end first, as the real ones do.
"""

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).parent.parent))

from recordings import case_of, load, written_to


def main() -> None:
    folder, *argv = sys.argv[1:]
    case = case_of(argv, os.environ)
    path = Path(folder) / f"{case}.jsonl"
    if not path.exists():
        sys.exit(f"there is no recording of the case {case!r}: scripts/record-clis makes them")
    recording = load(path.read_text())

    def stop(*_: object) -> NoReturn:
        os._exit(recording.stopped or 0)

    signal.signal(signal.SIGTERM, stop)
    sys.stdin.buffer.read()
    for name, text in recording.files.items():
        if target := written_to(name, argv, os.environ):
            target.write_text(text)
    for stream, line in recording.lines:
        file = sys.stdout if stream == "out" else sys.stderr
        file.buffer.write(line.encode("utf-8", "surrogateescape"))
        file.buffer.flush()
    while recording.exit is None:
        signal.pause()
    sys.exit(recording.exit)


main()
