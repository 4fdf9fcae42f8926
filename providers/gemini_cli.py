"""Gemini by its command, for those who have only a login: one process for each answer."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from functools import partial

import trio

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
from .cli_found import LIFETIME, find
from .cli_prompt import CliPrompt, cli_prompt
from .gemini_found import NOT_INSTALLED, login_file, look
from .gemini_home import ALIASES, MAX_PROMPT, SUBSTITUTED, Login, launch, may_name_a_file
from .gemini_messages import MAX_STOP
from .gemini_options import GeminiOptions
from .gemini_output import GeminiOutput
from .gemini_settings import BASE_URL, KEYS, GeminiSettings
from .openai_errors import ErrorReader
from .options import read_options
from .private_folder import Folder

#: The model where none is configured: the command's own. For many newer names it asks others.
MODEL = "gemini-2.5-pro"
_HINT = "log in again: start `gemini` and type `/auth`; or check the key"
#: Google's variables that only say what is said here otherwise.
_TAKEN = (*KEYS, "GOOGLE_GEMINI_BASE_URL")


class GeminiCli:
    """A `Provider`."""

    def __init__(self, settings: GeminiSettings) -> None:
        """Raises `ValueError` that names the wrong setting; starts nothing."""
        key, url = settings.key, settings.url
        self._settings = settings
        self._login = Login(settings.environment)
        place = {"GOOGLE_GEMINI_BASE_URL": url} if url != BASE_URL else {}
        self._keys = {"GEMINI_API_KEY": key, **place} if key else {}
        self._errors = ErrorReader(settings.name, [key], key=_HINT)
        #: Why Google did not take the login, as it was then, and until when that counts.
        self._refusal: tuple[str, Login.State, float] | None = None
        models = settings.models or (MODEL,)
        self._offers = tuple(ModelOffer(id=model, egress=True) for model in models)

    @property
    def name(self) -> str:
        return self._settings.name

    def models(self) -> Sequence[ModelOffer]:
        """The configured ones: the command tells of none."""
        return self._offers

    def open(self, request: GenerateRequest) -> CliAnswer:
        stop = request.sampling.stop
        return CliAnswer(
            Origin(provider=self.name, model=request.model),
            partial(self._prepare, request),
            GeminiOutput(self._errors, request.model, self._refused),
            stop=stop if len(stop) > MAX_STOP else (),
        )

    def _access(self) -> Mapping[str, str] | Login:
        """A key that was configured for it, else the login, else a key of the environment."""
        has_login = login_file(self._settings.environment).exists()
        if self._keys and (self._settings.api_key or not has_login):
            return self._keys
        return self._login

    def _prepare(self, request: GenerateRequest, folder: Folder) -> Launch:
        """Raises a `GenerateError`, `OSError`."""
        prompt = cli_prompt(request, self.name, most_bytes=MAX_PROMPT)
        options = read_options(GeminiOptions, request.extra)
        self._refuse(request, prompt, options)
        own = self._settings.environment
        program = find(self._settings.command, own)
        if program is None:
            text = f"{self.name} is {NOT_INSTALLED.reason}: {NOT_INSTALLED.hint}"
            raise ProviderUnavailable(text)
        seen = {name: value for name, value in own.items() if name not in _TAKEN}
        return launch(program, seen, folder, prompt, request, options, self._access())

    def _refuse(self, request: GenerateRequest, prompt: CliPrompt, options: GeminiOptions) -> None:
        """Raises `ProviderUnavailable` for what the command would do otherwise, or not at all."""
        if request.model in ALIASES:
            text = f"{request.model!r} is whichever model the `gemini` command likes: name one"
            raise ProviderUnavailable(f"{self.name}: {text}")
        if not re.fullmatch(r"\w[\w./:@-]*", request.model, re.ASCII):
            raise ProviderUnavailable(f"{self.name}: {request.model!r} is no name of a model")
        for word in SUBSTITUTED:
            if word in prompt.system:
                raise ProviderUnavailable(f"{self.name} would put something else for {word}")
        if may_name_a_file(prompt.text):
            raise ProviderUnavailable(f"{self.name} would take what follows an @ for a file")
        if options.include_thoughts:
            raise ProviderUnavailable(f"{self.name} does not show thoughts without a key")

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        raise ProviderUnavailable(f"{self.name} makes no embeddings without a key")

    async def check(self) -> Health:
        """As far as files tell, and the last answer: it starts nothing."""
        return await trio.to_thread.run_sync(self._look)

    def _look(self) -> Health:
        settings = self._settings
        found = look(settings.environment, settings.command, keyed=bool(self._keys))
        if found.state == "ready" and self._refusal is not None:
            reason, state, until = self._refusal
            if time.monotonic() < until and state == self._login.state():
                return Health(state="unavailable", reason=reason, hint=_HINT)
        return found

    def _refused(self, reason: str) -> None:
        """Ask no more with this login, or this key, for a while."""
        self._refusal = (reason, self._login.state(), time.monotonic() + LIFETIME)
