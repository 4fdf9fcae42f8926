"""`copilot_cli`: the `copilot` command, one process for each answer.

The way out where no runtime can be kept (`copilot_sdk`): it starts 2 s later, and Copilot's own
system prompt stays, which wants short answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from .base import (
    Embedding,
    EmbedRequest,
    GenerateRequest,
    Health,
    ModelOffer,
    Origin,
    ProviderUnavailable,
)
from .cli_answer import CliAnswer, Launch
from .cli_prompt import CliPrompt, cli_prompt
from .copilot_login import Login, child_environment
from .copilot_output import CopilotOutput
from .copilot_program import MAX_PROMPT, CopilotProgram
from .copilot_settings import CopilotOptions, CopilotSettings
from .options import read_options
from .private_folder import Folder

#: The longest line of its output: one repeats the prompt twice, with each character escaped.
MAX_LINE = 64 << 20
#: All that it does by itself is taken away. `none` is a tool that it does not have: an empty list
#: would be all of them. That option takes many values, and stands last.
FLAGS = (
    *("--output-format", "json", "--stream", "on", "-s", "--no-color", "--log-level", "none"),
    *("--no-custom-instructions", "--no-auto-update", "--no-ask-user", "--disable-builtin-mcps"),
    *("--no-remote", "--no-remote-export", "--disallow-temp-dir", "--disable-client-telemetry"),
)
#: It drops white space before it looks.
_COMMAND = re.compile(r"[\s\ufeff]*/")
_TELEMETRY = "COPILOT_OTEL_FILE_EXPORTER_PATH"
NO_TOOLS = ("--available-tools", "none")


class CopilotCli:
    """A `Provider`."""

    def __init__(self, settings: CopilotSettings) -> None:
        """Raises `ValueError` that names the wrong setting; starts nothing."""
        self._program = CopilotProgram(settings)
        self._settings = self._program.settings

    @property
    def name(self) -> str:
        return self._settings.name

    def models(self) -> Sequence[ModelOffer]:
        """The configured ones: the command tells of none."""
        return self._program.offers()

    def open(self, request: GenerateRequest) -> CliAnswer:
        return CliAnswer(
            Origin(provider=self.name, model=request.model),
            partial(self._prepare, request),
            CopilotOutput(self._program.errors),
            stop=request.sampling.stop,
        )

    def _prepare(self, request: GenerateRequest, folder: Folder) -> Launch:
        """Raises a `GenerateError`, `OSError`."""
        prompt = cli_prompt(request, self.name, most_bytes=MAX_PROMPT)
        options = read_options(CopilotOptions, request.extra)
        program, login = self._program.find(), self._program.login()
        report = folder.path / "telemetry.jsonl"
        seen = child_environment(self._settings, login, folder.path / "home")
        seen |= {
            "COPILOT_OTEL_EXPORTER_TYPE": "file",
            "COPILOT_OTEL_FILE_EXPORTER_PATH": str(report),
        }
        seen |= self._access(login, request)
        return Launch(
            [str(program), *FLAGS, *_chosen(login, request, options), *NO_TOOLS],
            seen,
            _one_text(prompt).encode(),
            max_line=MAX_LINE,
            report=report,
        )

    def _access(self, login: Login, request: GenerateRequest) -> dict[str, str]:
        settings = self._settings
        if login.kind == "token":
            return {"COPILOT_GITHUB_TOKEN": login.token}
        if login.kind != "server":
            return {}
        said = {
            "COPILOT_PROVIDER_TYPE": settings.server,
            "COPILOT_PROVIDER_WIRE_API": settings.wire_api,
            "COPILOT_MODEL": request.model,
            "COPILOT_PROVIDER_API_KEY": settings.api_key or "",
            "COPILOT_PROVIDER_MAX_OUTPUT_TOKENS": str(request.sampling.max_tokens or ""),
        }
        return {name: value for name, value in said.items() if value}

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        raise ProviderUnavailable(f"{self.name} makes no embeddings")

    async def check(self) -> Health:
        """See `CopilotProgram.check`."""
        return await self._program.check()


def _chosen(login: Login, request: GenerateRequest, options: CopilotOptions) -> list[str]:
    """`--name=value`, so that no value is taken for a flag."""
    chosen = {"reasoning-effort": options.reasoning_effort, "context": options.context_tier}
    if login.kind != "server":
        chosen |= {"model": request.model}  # type: ignore[dict-item] # any name
    return [f"--{name}={value}" for name, value in chosen.items() if value is not None]


def _one_text(prompt: CliPrompt) -> str:
    """Its system prompt cannot be another: what the request says there goes before the rest.

    What begins with a slash it would take for one of its commands, such as `/compact`; so that is
    written as a turn among several is.
    """
    text = f"{prompt.system}\n\n{prompt.text}" if prompt.system else prompt.text
    return f"user: {text}" if _COMMAND.match(text) else text
