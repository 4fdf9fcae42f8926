"""`GeminiCli` with programs in the place of the `gemini` command: recordings of it, and one that
tells how it was started."""

import json
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from asking import ask, asked
from faults import PARTIAL, WHOLE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recordings import playing_program

from promptmesh.providers import gemini_home
from promptmesh.providers.base import (
    ContextTooLong,
    EmbedRequest,
    GenerateError,
    GenerateRequest,
    Image,
    Message,
    ModelOffer,
    Origin,
    ProviderRefused,
    ProviderUnavailable,
    RequestRejected,
    Sampling,
)
from promptmesh.providers.cli_prompt import PLAIN_SYSTEM, CliPrompt
from promptmesh.providers.gemini_cli import GeminiCli
from promptmesh.providers.gemini_found import installed_version, look
from promptmesh.providers.gemini_home import Login, may_name_a_file, settings_of
from promptmesh.providers.gemini_http import GeminiHttp
from promptmesh.providers.gemini_options import GeminiOptions
from promptmesh.providers.gemini_settings import GeminiSettings
from promptmesh.providers.options import SettingsError
from promptmesh.providers.private_folder import Folder
from promptmesh.providers.registry import build

KEY = "AIza-abcdef0123456789"
LOGIN = {"access_token": "at", "refresh_token": "rt", "expiry_date": 1}
#: Tells how it was started, as its answer.
PROBE = """#!/bin/sh
cat >"$HOME/stdin"
exec {python} -S -E - "$@" <<'PROGRAM'
import json, os, sys
home = os.environ["HOME"]
read = lambda path: open(path, newline="", encoding="utf-8").read()
told = {{
    "argv": sys.argv[1:],
    "environment": dict(os.environ),
    "stdin": read(home + "/stdin"),
    "cwd": os.listdir("."),
    "settings": json.loads(read(home + "/.gemini/settings.json")),
    "mode": os.stat(home + "/.gemini/settings.json").st_mode & 0o777,
    "files": sorted(os.listdir(home + "/.gemini")),
    "system": read(os.environ["GEMINI_SYSTEM_MD"]),
}}
login = home + "/.gemini/oauth_creds.json"
if os.path.exists(login):
    told["login"] = json.loads(read(login))
    open(login, "w").write(json.dumps(dict(told["login"], access_token="fresh")))
print(json.dumps({{"type": "message", "role": "assistant", "content": json.dumps(told)}}))
print(json.dumps({{"type": "result", "status": "success"}}))
with open(os.environ["GEMINI_TELEMETRY_OUTFILE"], "w") as file:
    attributes = {{"event.name": "gemini_cli.api_response", "finish_reasons": ["stop"]}}
    json.dump({{"attributes": attributes}}, file)
PROGRAM
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A user's home, with a login."""
    (tmp_path / "home" / ".gemini").mkdir(parents=True)
    (tmp_path / "home" / ".gemini" / "oauth_creds.json").write_text(json.dumps(LOGIN))
    (tmp_path / "home" / ".gemini" / "settings.json").write_text('{"mcpServers": {"bad": {}}}')
    return tmp_path / "home"


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    path = tmp_path / "gemini"
    path.write_text(PROBE.format(python=sys.executable))
    path.chmod(0o755)
    return path


def provider(command: Path, home: Path, base_url: str = "", **fields: Any) -> GeminiCli:
    values = {
        "name": "gemini",
        "mode": "cli",
        "api_key": KEY,
        "command": str(command),
        "environment": {"PATH": os.environ["PATH"], "HOME": str(home)},
    }
    return GeminiCli(GeminiSettings(**{"base_url": base_url, **values, **fields}))


def player(tmp_path: Path, home: Path, case: str, **fields: Any) -> GeminiCli:
    """The command as it was recorded in that case."""
    program = playing_program(tmp_path, "gemini", "played")
    return provider(program, home, f"http://127.0.0.1:1/m/{case}", **fields)


async def told(provider: GeminiCli, request: GenerateRequest | None = None) -> Any:
    """How the probe was started."""
    return json.loads((await ask(provider, request)).text)


# --- answers and failures ------------------------------------------------------------------------


async def test_an_answer(tmp_path: Path, home: Path) -> None:
    gemini = player(tmp_path, home, "ok")
    with trio.fail_after(120):
        async with gemini.open(asked()) as answering:
            assert answering.origin == Origin(provider="gemini", model="stub-model")
            found = await answering.completion()
    assert (found.text, found.finish_reason) == (WHOLE, "stop")
    assert found.usage.total_tokens == 16


async def test_a_failure(tmp_path: Path, home: Path) -> None:
    with pytest.raises(ProviderRefused) as caught, trio.fail_after(120):
        await ask(player(tmp_path, home, "e429-7"))
    assert caught.value.retry_after == 7.0


async def test_who_leaves_ends_the_process(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    with trio.fail_after(120):
        async with player(tmp_path, home, "stall").open(asked()) as answering:
            assert (await anext(answering.chunks)).text == PARTIAL
            assert len(list((tmp_path / "t").iterdir())) == 1
    assert not list((tmp_path / "t").iterdir())


async def test_a_command_that_is_not_there(tmp_path: Path, home: Path) -> None:
    with pytest.raises(ProviderUnavailable, match="not installed: npm install"):
        await ask(provider(tmp_path / "none", home))


async def test_a_command_that_cannot_be_run(tmp_path: Path, home: Path) -> None:
    (tmp_path / "gemini").write_bytes(b"\x7fELF")
    (tmp_path / "gemini").chmod(0o755)
    with pytest.raises(ProviderUnavailable, match="cannot be started: Exec format error"):
        await ask(provider(tmp_path / "gemini", home))


async def test_stop_strings_that_gemini_does_not_take(tmp_path: Path, home: Path) -> None:
    sampling = Sampling(stop=("upon", *"ABCDEF"))
    found = await ask(player(tmp_path, home, "ok"), asked(sampling=sampling))
    assert (found.text, found.finish_reason, found.usage.exact) == ("Once ", "stop", False)


# --- how it is started ---------------------------------------------------------------------------


async def test_how_it_is_started_with_a_key(
    probe: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "of another vendor")
    gemini = provider(probe, home, "http://127.0.0.1:1/m/ok")
    said = await told(gemini, asked("hi\n", system="Be brief."))
    assert said["argv"] == ["-m", "stub-model", "-o", "stream-json", "--skip-trust"]
    assert (said["stdin"], said["system"]) == ("hi\n", "Be brief.")
    # Its settings of a folder end the search for those of the folders above.
    assert said["cwd"] == [".gemini"]
    assert (said["files"], said["mode"]) == (["settings.json"], 0o600)
    environment = said["environment"]
    assert environment["GEMINI_API_KEY"] == KEY
    assert environment["GOOGLE_GEMINI_BASE_URL"] == "http://127.0.0.1:1/m/ok"
    assert environment["GEMINI_CLI_NO_RELAUNCH"] == "true"
    assert "setBlocking" in environment["NODE_OPTIONS"]
    assert environment["HOME"] == environment["GEMINI_CLI_HOME"] != str(home)
    assert not {"ANTHROPIC_API_KEY", "GOOGLE_API_KEY"} & environment.keys()
    assert not await trio.Path(environment["HOME"]).exists()
    assert said["settings"]["security"]["auth"]["selectedType"] == "gemini-api-key"
    assert said["settings"]["mcpServers"] == {}
    assert KEY not in json.dumps(said["settings"])


async def test_without_a_system_text_its_own_is_not_used(probe: Path, home: Path) -> None:
    assert (await told(provider(probe, home)))["system"] == PLAIN_SYSTEM


async def test_a_login_is_copied_and_never_written_back(probe: Path, home: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "GEMINI_CLI_HOME": str(home)}
    gemini = provider(probe, home, api_key=None, environment=environment)
    file = home / ".gemini" / "oauth_creds.json"
    (home / ".gemini" / "google_accounts.json").write_text("{}")
    said = await told(gemini)
    assert said["login"] == LOGIN
    assert said["settings"]["security"]["auth"]["selectedType"] == "oauth-personal"
    assert said["files"] == ["google_accounts.json", "oauth_creds.json", "settings.json"]
    assert "GEMINI_API_KEY" not in said["environment"]
    assert json.loads(file.read_text()) == LOGIN
    # What the run made of it the next run gets; another login of the user goes before.
    assert (await told(gemini))["login"]["access_token"] == "fresh"
    file.write_text(json.dumps(LOGIN | {"refresh_token": "of another account"}))
    assert (await told(gemini))["login"]["access_token"] == "at"


def test_only_a_whole_login_is_learnt(home: Path, tmp_path: Path) -> None:
    login = Login({"HOME": str(home)})
    for number, left in enumerate(["", '{"refresh', "[]", '{"refresh_token": "other"}', "null"]):
        private = tmp_path / str(number)
        private.mkdir()
        login.copy_to(private)
        copy = private / "oauth_creds.json"
        assert json.loads(copy.read_text()) == LOGIN
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        copy.write_text(left)
        login.learn_from(private)


async def test_no_key_and_no_login(probe: Path, tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "PATH": "/bin"}
    gemini = provider(probe, tmp_path, api_key=None, environment=environment)
    with pytest.raises(ProviderUnavailable, match="not logged in: start `gemini`"):
        await ask(gemini)


async def test_who_pays(probe: Path, home: Path, tmp_path: Path) -> None:
    """A key that was configured, else the login, else a key of the environment."""
    environment = {"PATH": os.environ["PATH"], "GOOGLE_API_KEY": "AIza-of-the-environment"}
    for api_key, folder, key in (
        (KEY, home, KEY),
        (None, home, None),
        (None, tmp_path, "AIza-of-the-environment"),
    ):
        gemini = provider(
            probe, home, api_key=api_key, environment=environment | {"HOME": str(folder)}
        )
        assert (await told(gemini))["environment"].get("GEMINI_API_KEY") == key


def test_settings_for_what_there_is_no_flag_for() -> None:
    sampling = Sampling(temperature=0.0, top_p=0.5, max_tokens=9, stop=("END",), seed=1)
    options = GeminiOptions(thinking_budget=0, safety="off")
    said = settings_of(asked(sampling=sampling), options, keyed=True)
    (override,) = said["modelConfigs"]["overrides"]
    assert override["match"] == {"model": "stub-model"}
    config = override["modelConfig"]["generateContentConfig"]
    assert len(config.pop("safetySettings")) == 4
    assert config == {
        "temperature": 0.0,
        "topP": 0.5,
        "maxOutputTokens": 9,
        "stopSequences": ("END",),
        "seed": 1,
        "thinkingConfig": {"thinkingBudget": 0, "thinkingLevel": None},
    }


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "@secret.txt",
        "@/etc/hostname",
        "me@a.example, @home and @x/y.z",
        "!ls",
        "--help",
        "-p x",
        "$(id) `id` ${HOME}",
        " \r\n\t ends in spaces \n\n",
        "\u00fc\u2603\U0001f600",
        "\x1b[31m\x7f",
    ],
)
async def test_a_prompt_arrives_as_it_is(text: str, probe: Path, home: Path) -> None:
    said = await told(provider(probe, home), asked(text))
    assert said["stdin"] == text
    assert text not in said["argv"]


async def test_no_prompt_is_a_command_of_its_own(probe: Path, home: Path) -> None:
    """What begins with a new line is none."""
    for text in ("/quit", "/directory add /etc", "/"):
        assert (await told(provider(probe, home), asked(text)))["stdin"] == f"\n{text}"
    for text in ("// a comment", "/* another */"):
        assert (await told(provider(probe, home), asked(text)))["stdin"] == text


def test_prompts_full_of_ats_are_read_soon() -> None:
    """In time that grows with their length, and not with its square."""
    for text in ("@" * 400_000, "@a/" * 100_000, '@"a ' * 100_000, "@\\ " * 100_000):
        assert not may_name_a_file(text)


@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_any_prompt_and_system_text_arrive_as_they_are(text: str, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as place:
        folder = Folder(Path(place))
        folder.work.mkdir()
        request = asked(text, system=text)
        prompt = CliPrompt(text, text)
        key = {"GEMINI_API_KEY": KEY}
        found = gemini_home.launch("x", {}, folder, prompt, request, GeminiOptions(), key)
        system = Path(found.environment["GEMINI_SYSTEM_MD"])
        assert system.read_bytes() == text.encode()
        assert found.text in (text.encode(), b"\n" + text.encode())
        assert found.max_line > len(json.dumps(text))


@pytest.mark.parametrize(
    ("request_", "kind", "said"),
    [
        (asked("a\0b"), ProviderUnavailable, "NUL"),
        (asked("a\ud800"), RequestRejected, "not valid text"),
        (asked("a" * 4_000_001), ContextTooLong, "4000001 bytes"),
        (asked("  \n"), RequestRejected, "nothing to answer"),
        (asked(system="${SubAgents}"), ProviderUnavailable, "something else for ${SubAgents}"),
        (asked("what is in @./?"), ProviderUnavailable, "for a file"),
        (asked('@"../home/.gemini"'), ProviderUnavailable, "for a file"),
        (asked('@"two words/../../home"'), ProviderUnavailable, "for a file"),
        (asked("@a\u2003b/../.."), ProviderUnavailable, "for a file"),
        (asked("(@a\\ b/../.. )"), ProviderUnavailable, "for a file"),
        (asked("@.gemini/.env"), ProviderUnavailable, "for a file"),
        (asked(extra={"include_thoughts": True}), ProviderUnavailable, "does not show thoughts"),
        (asked(extra={"thinking_budge": 1}), RequestRejected, "did you mean 'thinking_budget'"),
        (asked(prefix="Once"), ProviderUnavailable, "cannot continue"),
        *(
            (msgspec.structs.replace(asked(), model=m), ProviderUnavailable, "no name of a model")
            for m in ("--yolo", "", "a\0b", "two words", "\u00fc")
        ),
        (
            msgspec.structs.replace(asked(), model="auto"),
            ProviderUnavailable,
            "whichever model the `gemini` command likes",
        ),
        (
            GenerateRequest(
                model="m",
                messages=(Message(role="user", content=(Image(url="https://a.example/b.png"),)),),
            ),
            ProviderUnavailable,
            "cannot look at images",
        ),
    ],
)
async def test_what_it_is_not_asked(
    request_: GenerateRequest, kind: type[GenerateError], said: str, tmp_path: Path, home: Path
) -> None:
    with pytest.raises(GenerateError) as caught:
        await ask(provider(tmp_path / "never started", home), request_)
    assert type(caught.value) is kind
    assert said in caught.value.message


async def test_no_embeddings(tmp_path: Path, home: Path) -> None:
    with pytest.raises(ProviderUnavailable, match="makes no embeddings"):
        await provider(tmp_path, home).embed(EmbedRequest(model="m", inputs=("a",)))


# --- health, models, and the two ways ------------------------------------------------------------


def install(folder: Path, version: str = "0.61.0", name: str = "@google/gemini-cli") -> Path:
    """The command as npm installs it; its `bin` folder."""
    package = folder / "lib" / "node_modules" / "@google" / "gemini-cli"
    (package / "bundle").mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"name": name, "version": version}))
    program = package / "bundle" / "gemini.js"
    program.write_text("#!/usr/bin/env node\n")
    program.chmod(0o755)
    (folder / "bin").mkdir()
    (folder / "bin" / "gemini").symlink_to(program)
    (folder / "bin" / "node").write_text("")
    (folder / "bin" / "node").chmod(0o755)
    return folder / "bin"


async def test_check(tmp_path: Path, home: Path) -> None:
    bin = install(tmp_path / "npm")
    environment = {"PATH": str(bin), "HOME": str(tmp_path)}
    assert look({"PATH": str(tmp_path), "HOME": str(home)}).reason == "not installed"
    assert look(environment).reason == "not logged in"
    assert look(environment, keyed=True).state == "ready"
    assert look(environment | {"HOME": str(home)}).state == "ready"
    (bin / "node").unlink()
    assert "Node.js" in look(environment, keyed=True).hint
    gemini = provider(bin / "gemini", home, environment={"PATH": str(bin), "HOME": str(home)})
    assert (await gemini.check()).state == "unavailable"


async def test_a_login_that_was_refused_is_asked_no_more_until_it_changes(
    tmp_path: Path, home: Path
) -> None:
    gemini = player(tmp_path, home, "e401")
    assert (await gemini.check()).state == "ready"
    with pytest.raises(ProviderRefused):
        await ask(gemini)
    found = await gemini.check()
    assert (found.state, "Incorrect API key" in found.reason) == ("unavailable", True)
    assert "log in again" in found.hint
    (home / ".gemini" / "oauth_creds.json").write_text('{"refresh_token": "another"}')
    assert (await gemini.check()).state == "ready"


def test_the_version_is_read_from_its_package(tmp_path: Path) -> None:
    bin = install(tmp_path / "old", "0.9.2")
    assert installed_version(str(bin / "gemini")) == (0, 9, 2)
    found = look({"PATH": str(bin)}, keyed=True)
    assert (found.state, found.reason) == ("unavailable", "version 0.9.2 is too old")
    other = install(tmp_path / "other", "0.1", name="another")
    assert installed_version(str(other / "gemini")) == ()
    assert look({"PATH": str(other)}, keyed=True).state == "ready"
    assert installed_version(str(tmp_path / "nothing")) == ()


def test_models(tmp_path: Path, home: Path) -> None:
    assert provider(tmp_path, home).models() == (ModelOffer(id="gemini-2.5-pro", egress=True),)
    found = provider(tmp_path, home, models=("a", "b")).models()
    assert [offer.id for offer in found] == ["a", "b"]


def test_the_kind_goes_by_http_where_there_is_a_key() -> None:
    keyed = {"environment": {"GEMINI_API_KEY": KEY}}
    assert isinstance(build("gemini_cli", "g", keyed), GeminiHttp)
    assert isinstance(build("gemini_cli", "g", {"api_key": KEY}), GeminiHttp)
    assert isinstance(build("gemini_cli", "g", {}), GeminiCli)
    assert isinstance(build("gemini_cli", "g", keyed | {"mode": "cli"}), GeminiCli)
    with pytest.raises(SettingsError, match="there is no key: set GEMINI_API_KEY"):
        build("gemini_cli", "g", {"mode": "http"})
    with pytest.raises(SettingsError, match="did you mean 'models'"):
        build("gemini_cli", "g", {"model": ["m"]})
