"""A `copilot` that says what the real one said: as a command, and as the runtime of the SDK."""

from __future__ import annotations

import sys
from pathlib import Path

from recordings import RECORDED

_PROGRAMS = Path(__file__).parent / "programs"


def playing_copilot(folder: Path) -> Path:
    """The program, in `folder`. `-S -E`: it starts in 20 ms."""
    words = (sys.executable, "-S", "-E")
    kept = (*words, _PROGRAMS / "copilot_runtime.py", RECORDED / "copilot_sdk")
    once = (*words, _PROGRAMS / "play_recording.py", RECORDED / "copilot")
    path = folder / "copilot"
    path.write_text(
        "#!/bin/sh\n"
        'case " $* " in\n'
        f'*" --headless "*) exec {_quoted(*kept)} "$@" ;;\n'
        f'*) exec {_quoted(*once)} "$@" ;;\n'
        "esac\n"
    )
    path.chmod(0o755)
    return path


def _quoted(*words: object) -> str:
    return " ".join(f"'{word}'" for word in words)
