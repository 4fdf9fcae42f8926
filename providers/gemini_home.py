"""A home of one run for the `gemini` command, and how it is started there.

The user's own `~/.gemini` is not used as it is: its settings may start servers, hooks and tools,
and the command would keep the conversation there. What is needed of it is the login, which is
copied into the private home and never written back: Google's refresh tokens do not change when they
are used, so the user's own stays good, and a process that is killed while it writes can spoil
nothing but its copy. The access token that it may fetch there (one lasts an hour) is remembered for
the next runs instead, as long as the user's own file does not change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import GenerateRequest, ProviderUnavailable
from .child import MAX_LINE
from .cli_answer import Launch
from .cli_prompt import PLAIN_SYSTEM, CliPrompt
from .gemini_found import NOT_LOGGED_IN, home, login_file
from .gemini_messages import MAX_STOP, sampling_fields
from .gemini_options import GeminiOptions, least_thoughts, safety_settings, thinking_config
from .private_folder import Folder

#: The command reads no more than 8 MiB and drops the rest without a word; above the context window
#: of 1,048,576 tokens, which is less, it asks nobody, and ends as if all were well.
MAX_PROMPT = 4_000_000
#: What it puts something else for in a system text.
SUBSTITUTED = ("${AgentSkills}", "${SubAgents}", "${AvailableTools}")
#: A file of a login is read so far, in bytes.
_MAX_LOGIN = 64 * 1024
#: It ends by `process.exit`, which drops what its output has not taken yet: the end of a long
#: answer that is read slowly, or all of a quick one after a long prompt, which it repeats.
_BLOCKING = "--import=data:text/javascript,process.stdout._handle?.setBlocking?.(true)"
_VARIABLES = {
    "GEMINI_CLI_NO_RELAUNCH": "true",
    "NODE_OPTIONS": _BLOCKING,
    # The only place where the reason of an answer's end is told.
    "GEMINI_TELEMETRY_ENABLED": "true",
    "GEMINI_TELEMETRY_TARGET": "local",
    "GEMINI_TELEMETRY_LOG_PROMPTS": "false",
    "NO_COLOR": "1",
    "TERM": "xterm-256color",
    "COLORTERM": "truecolor",
}
#: Longest of a line that repeats the prompt: a character may become `\u001b` there.
_ESCAPED = 6
#: What the command asks another model for, or whichever it likes.
ALIASES = frozenset({"auto", "pro", "flash", "flash-lite"})

_SETTINGS: dict[str, Any] = {
    "general": {
        "maxAttempts": 1,
        "retryFetchErrors": False,
        "enableAutoUpdate": False,
        "enableAutoUpdateNotification": False,
        "disableAutoUpdate": True,
        "disableUpdateNag": True,
        "sessionRetention": {"enabled": False},
        "checkpointing": {"enabled": False},
    },
    "privacy": {"usageStatisticsEnabled": False},
    "billing": {"overageStrategy": "never"},  # a login has credits, which are money
    # It counts what a model repeats, takes it for a loop, and cuts the answer; it sums up a long
    # chat by another request.
    "model": {
        "disableLoopDetection": True,
        "compressionThreshold": 1000,
        "skipNextSpeakerCheck": True,
    },
    "tools": {"core": [], "useRipgrep": False},
    "mcpServers": {},
    "context": {"fileName": "NONE.md", "includeDirectoryTree": False},
    "skills": {"enabled": False},
    "hooksConfig": {"enabled": False},
    "experimental": {"enableAgents": False},
    "advanced": {"ignoreLocalEnv": True},
}


class Login:
    """The user's login with Google."""

    State = tuple[int, int] | None

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._file = login_file(environment)
        self._account = home(environment) / "google_accounts.json"
        #: The user's file as it was, and what a run made of its copy.
        self._seen = ""
        self._fresh = ""

    def state(self) -> State:
        """Another one after each login of the user."""
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    def copy_to(self, private: Path) -> None:
        """Raises `ProviderUnavailable` if there is none."""
        own = _read(self._file)
        if not own:
            raise ProviderUnavailable(f"{NOT_LOGGED_IN.reason}: {NOT_LOGGED_IN.hint}")
        if own != self._seen:
            self._seen, self._fresh = own, ""
        _write(private / self._file.name, self._fresh or own)
        if account := _read(self._account):
            _write(private / self._account.name, account)

    def learn_from(self, private: Path) -> None:
        """Remember the token that a run fetched, if it is whole."""
        told = _read(private / self._file.name)
        if told and _refresh_token(told) and _refresh_token(told) == _refresh_token(self._seen):
            self._fresh = told


def _refresh_token(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:  # it was cut while it was written
        return ""
    token = value.get("refresh_token") if isinstance(value, dict) else None
    return token if isinstance(token, str) else ""


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_LOGIN).decode("utf-8", "replace")
    except OSError:
        return ""


def _write(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8", newline="")


def settings_of(request: GenerateRequest, options: GeminiOptions, *, keyed: bool) -> dict[str, Any]:
    """The settings of the command for one request; there are no flags for what they say."""
    thinking = thinking_config(options, least_thoughts(request))
    if thinking:
        # They are merged with the command's own, and a model refuses both a budget and a level.
        thinking = {"thinkingBudget": None, "thinkingLevel": None, **thinking}
    generate = {
        **sampling_fields(request.sampling),
        "thinkingConfig": thinking or None,
        "safetySettings": safety_settings(options) or None,
    }
    if len(request.sampling.stop) > MAX_STOP:
        del generate["stopSequences"]  # they are looked for in what it says
    override = {
        "match": {"model": request.model},
        "modelConfig": {
            "generateContentConfig": {n: v for n, v in generate.items() if v is not None}
        },
    }
    kind = "gemini-api-key" if keyed else "oauth-personal"
    return {
        "security": {"auth": {"selectedType": kind}, "folderTrust": {"enabled": False}},
        "modelConfigs": {"overrides": [override]},
        **_SETTINGS,
    }


def may_name_a_file(text: str) -> bool:
    """Might the command put something else for what stands after an `@`? There are no files but its
    own, whose names begin with a dot, or which stand above the empty folder that it works in."""
    quoted = text.find('@"')
    if re.search(r'(?<!\\)@"?\.', text) or (quoted >= 0 and "/." in text[quoted:]):
        return True
    words = re.split(r"[ \t\n\r]", text.replace("\\ ", ""))
    return any("/." in word[word.index("@") :] for word in words if "@" in word)


def prompt_text(text: str) -> str:
    """What arrives as this prompt: one that begins with `/` may be a command of its own, of which
    `/directory add` shows the model a folder of this machine. One that begins with a new line is
    none, and so is a comment."""
    return f"\n{text}" if re.match(r"/(?![/*])", text) else text


def launch(
    program: str,
    environment: Mapping[str, str],
    folder: Folder,
    prompt: CliPrompt,
    request: GenerateRequest,
    options: GeminiOptions,
    access: Mapping[str, str] | Login,
) -> Launch:
    """Furnish the home in `folder`, and say how to start the command. `access` is the variables
    with the key, or a login. Raises `OSError`; `ProviderUnavailable`."""
    private = folder.path / "home" / ".gemini"
    private.mkdir(parents=True, mode=0o700)
    login = access if isinstance(access, Login) else None
    settings = settings_of(request, options, keyed=login is None)
    _write(private / "settings.json", json.dumps(settings))
    if login is not None:
        login.copy_to(private)
    # It looks for one in all folders above, such as that of temporary files, where anybody may put
    # one, and takes a proxy or what else it says from the first that it finds.
    (folder.work / ".gemini").mkdir()
    (folder.work / ".gemini" / ".env").touch()
    report = folder.path / "telemetry.json"
    variables = {
        **environment,
        **({} if isinstance(access, Login) else access),
        **_VARIABLES,
        "HOME": str(private.parent),
        "GEMINI_CLI_HOME": str(private.parent),
        "GEMINI_SYSTEM_MD": str(folder.write("system.md", prompt.system or PLAIN_SYSTEM)),
        "GEMINI_TELEMETRY_OUTFILE": str(report),
    }
    text = prompt_text(prompt.text).encode()
    return Launch(
        command=(program, "-m", request.model, "-o", "stream-json", "--skip-trust"),
        environment=variables,
        text=text,
        max_line=MAX_LINE + _ESCAPED * len(text),
        report=report,
        after=(lambda: None) if login is None else (lambda: login.learn_from(private)),
    )
