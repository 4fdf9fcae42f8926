"""Claude by its command, for those who have only a login: one process for each answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial

import trio

from .anthropic_messages import ClaudeOptions, read_claude_options
from .base import (
    Embedding,
    EmbedRequest,
    GenerateRequest,
    Health,
    ModelOffer,
    Origin,
    ProviderUnavailable,
)
from .child import MAX_LINE
from .claude_found import BRIEF, LOGIN, NOT_INSTALLED, QUIET, Said, ask, login_file, look
from .claude_output import ClaudeOutput
from .claude_settings import BASE_URL, KEY, TOKEN, URL, ClaudeSettings
from .cli_answer import CliAnswer, Launch
from .cli_found import LIFETIME, Remembered, find, state_of
from .cli_prompt import PLAIN_SYSTEM, CliPrompt, cli_prompt
from .openai_errors import ErrorReader
from .private_folder import Folder

#: The model where none is configured: what the command calls the newest of that size.
MODEL = "sonnet"
#: The command takes 10 MB; above the context windows it asks nobody.
MAX_PROMPT = 8_000_000
_HINT = "log in again: start `claude` and type `/login`; or check the key"

#: It stands on the command line: no option, and nothing that a program's name cannot hold.
_MODEL_NAME = re.compile(r"\w[\w./:@\[\]-]*", re.ASCII)
_FLAGS = (
    "-p",
    "--output-format",
    "stream-json",
    "--verbose",
    "--include-partial-messages",
    "--no-session-persistence",
    "--strict-mcp-config",
    "--disable-slash-commands",
    "--permission-mode",
    "dontAsk",
    "--tools",
    "",
    "--setting-sources",
    "",
)
_VARIABLES = {
    **QUIET,
    "DISABLE_TELEMETRY": "1",
    "DISABLE_ERROR_REPORTING": "1",
    # One try: who is asked next is the router's business.
    "CLAUDE_CODE_MAX_RETRIES": "0",
    "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1",
    "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "1",
    "CLAUDE_CODE_DISABLE_REFUSAL_FALLBACK": "1",
    # A prompt with `@/path` would show the model that file.
    "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",
    "CLAUDE_CODE_DISABLE_CLAUDE_MDS": "1",
    "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
}


class ClaudeCli:
    """A `Provider`."""

    def __init__(self, settings: ClaudeSettings) -> None:
        """Raises `ValueError` that names the wrong setting; starts nothing."""
        url = settings.url
        self._settings = settings
        self._place = {URL: url} if url != BASE_URL else {}
        self._errors = ErrorReader(settings.name, [settings.key, settings.token], key=_HINT)
        self._said: Remembered[Said] = Remembered()
        #: Why the login, or the key, is not taken, which login that was, and until when that holds.
        self._refusal: tuple[str, tuple[int, ...], float] | None = None
        models = settings.models or (MODEL,)
        self._offers = tuple(ModelOffer(id=model, egress=True) for model in models)

    @property
    def name(self) -> str:
        return self._settings.name

    def models(self) -> Sequence[ModelOffer]:
        """The configured ones: the command tells of none."""
        return self._offers

    def open(self, request: GenerateRequest) -> CliAnswer:
        return CliAnswer(
            Origin(provider=self.name, model=request.model),
            partial(self._prepare, request),
            ClaudeOutput(self._errors, self._refused),
            stop=request.sampling.stop,
        )

    def _prepare(self, request: GenerateRequest, folder: Folder) -> Launch:
        """Raises a `GenerateError`, `OSError`."""
        prompt = cli_prompt(request, self.name, most_bytes=MAX_PROMPT)
        options = read_claude_options(request, self._settings.options)
        program = find(self._settings.command, self._settings.environment)
        if program is None:
            text = f"{self.name} is {NOT_INSTALLED.reason}: {NOT_INSTALLED.hint}"
            raise ProviderUnavailable(text)
        if not _MODEL_NAME.fullmatch(request.model):
            raise ProviderUnavailable(f"{self.name}: {request.model!r} is no name of a model")
        system = folder.write("system.md", prompt.system or PLAIN_SYSTEM)
        access = self._access(folder)
        effort = ("--effort", options.effort) if options.effort else ()
        said = _text(prompt).encode()
        return Launch(
            command=(
                program,
                *_FLAGS,
                *self._alone(program, access),
                *effort,
                "--model",
                request.model,
                "--system-prompt-file",
                str(system),
            ),
            environment={
                **self._seen(),
                **_VARIABLES,
                **_limits(request, options),
                **access,
                "CLAUDE_CODE_TMPDIR": str(folder.temporary),
            },
            text=said,
            max_line=MAX_LINE + 2 * len(said),
        )

    def _alone(self, program: str, access: Mapping[str, str]) -> Sequence[str]:
        """What keeps it from files and settings of this machine: with a login `--bare` would not
        find it, and older versions have nothing but the variables."""
        if KEY in access:
            return ("--bare",)
        said = trio.from_thread.run(self._ask, program)
        return ("--restricted",) if said.has("--restricted") else ()

    def _seen(self) -> Mapping[str, str]:
        own = self._settings.environment
        return {name: value for name, value in own.items() if name not in (KEY, TOKEN, URL, LOGIN)}

    def _access(self, folder: Folder) -> Mapping[str, str]:
        """A key that was configured for it, else the login, else a key of the environment.

        Only the login that the command keeps in a file needs the user's own folder: its refresh
        token changes each time it is used, so a copy would make the user's own useless.
        """
        settings, own = self._settings, self._settings.environment
        home = {**self._place, "HOME": str(folder.path), "CLAUDE_CONFIG_DIR": str(folder.path)}
        if own.get(LOGIN) and not settings.api_key:
            return {**home, LOGIN: own[LOGIN]}
        if settings.key and (settings.api_key or not login_file(own).exists()):
            return {**home, KEY: settings.key}
        return self._place

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        raise ProviderUnavailable(f"{self.name} makes no embeddings")

    async def check(self) -> Health:
        """By files, and what the command says of itself; that is remembered."""
        settings = self._settings
        health = await trio.to_thread.run_sync(
            partial(look, settings.environment, settings.command, keyed=self._keyed)
        )
        program = find(settings.command, settings.environment)
        if health.state != "ready" or program is None:
            return health
        if self._refusal is not None:
            reason, login, until = self._refusal
            if trio.current_time() < until and login == self._login():
                return Health(state="unavailable", reason=reason)
        with trio.move_on_after(BRIEF):
            try:
                return (await self._ask(program)).health
            except OSError as error:
                reason = f"it cannot be started: {error.strerror or error}"
                return Health(state="unavailable", reason=reason, hint=NOT_INSTALLED.hint)
        return health  # it is too slow now: as far as files tell

    def _login(self) -> tuple[int, ...]:
        """What changes when the user logs in anew."""
        return state_of(str(login_file(self._settings.environment)))

    def _refused(self, reason: str) -> None:
        """Ask no more with this login, or this key, for a while."""
        self._refusal = (reason, self._login(), trio.current_time() + LIFETIME)

    @property
    def _keyed(self) -> bool:
        return bool(self._settings.key)

    async def _ask(self, program: str) -> Said:
        """What the command says of itself, as long as neither it nor the login changes."""
        own = self._settings.environment
        login = {LOGIN: own[LOGIN]} if own.get(LOGIN) else {}
        question = partial(ask, program, {**self._seen(), **login}, keyed=self._keyed)
        return await self._said.get((program, str(login_file(own))), question)


def _text(prompt: CliPrompt) -> str:
    """What arrives as this prompt: one that begins with `/` might be a command of its own."""
    return f"\n{prompt.text}" if prompt.text.startswith("/") else prompt.text


def _limits(request: GenerateRequest, options: ClaudeOptions) -> Mapping[str, str]:
    """The command thinks unless it is told otherwise, and of the tokens of the answer."""
    budget = options.thinking if isinstance(options.thinking, int) else 0
    most = request.sampling.max_tokens
    found = {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(most + budget)} if most else {}
    if options.thinking is None:
        return {**found, "CLAUDE_CODE_DISABLE_THINKING": "1"}
    return {**found, "MAX_THINKING_TOKENS": str(budget)} if budget else found
