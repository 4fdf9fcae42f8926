"""What the `claude` and `gemini` commands wrote, read to the whole answer of a run."""

from __future__ import annotations

from recordings import Recording, recordings

from promptmesh.providers.base import Completion, CompletionBuilder
from promptmesh.providers.claude_output import ClaudeOutput
from promptmesh.providers.gemini_output import GeminiOutput
from promptmesh.providers.openai_errors import ErrorReader

#: In no error.
KEY = "sk-ant-abcdef0123456789"
#: The one that Gemini's command was asked for.
MODEL = "stub-model"
RECORDED = {vendor: recordings(vendor) for vendor in ("claude", "gemini")}


def output(recording: Recording, stream: str = "out") -> str:
    """What was written to standard output, or error (`err`)."""
    return "".join(line for written_to, line in recording.lines if written_to == stream)


def report_of(recording: Recording) -> str:
    """What Gemini's telemetry says of a run."""
    return recording.files.get("GEMINI_TELEMETRY_OUTFILE", "")


def play(vendor: str, case: str) -> Completion:
    """The whole answer of a recorded run. Raises what it ends in."""
    run = RECORDED[vendor][case]
    return read(vendor, output(run).encode(), output(run, "err"), report_of(run), run.exit)


def read(
    vendor: str, out: bytes, errors: str = "", report: str = "", code: int | None = 0
) -> Completion:
    """The same of a run that wrote this."""
    reader, builder = ErrorReader(vendor, [KEY]), CompletionBuilder()
    decoder = ClaudeOutput(reader) if vendor == "claude" else GeminiOutput(reader, MODEL)
    for line in out.splitlines():
        decoder.event("", line)
        for chunk in decoder.take():
            builder.add(chunk)
        if decoder.finished or decoder.failure is not None:
            break  # the program is killed now
    else:
        decoder.ended(code, errors, report)
        for chunk in decoder.take():
            builder.add(chunk)
    if decoder.failure is not None:
        assert not builder.finished
        raise decoder.failure
    assert decoder.finished
    return builder.completion()
