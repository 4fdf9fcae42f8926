"""The Copilot runtime that is kept, and the models of its account."""

from __future__ import annotations

from .base import ModelOffer, ProviderRefused, ProviderUnavailable
from .copilot_login import LOG_IN, child_environment
from .copilot_program import CopilotProgram
from .copilot_runtime import CopilotRuntime
from .copilot_wire import (
    FLAGS,
    NO_LOGIN_FLAG,
    TOKEN_FLAGS,
    TOKEN_VARIABLE,
    is_authenticated,
    listed_models,
)
from .json_rpc import WireError
from .keeper import Keeper
from .kept_process import Refused
from .private_folder import Folder


class CopilotKeeper(Keeper[CopilotRuntime]):
    """See the module."""

    #: Of a frame's head.
    MAX_LINE = 4096

    def __init__(self, program: CopilotProgram) -> None:
        super().__init__(CopilotRuntime, program.errors, program.settings.idle_timeout)
        self._program = program
        self._settings = program.settings
        #: The configured models, else those that Copilot listed when it was last started.
        self.offers = program.offers()

    def _launch(self, folder: Folder) -> tuple[list[str], dict[str, str]]:
        login = self._program.login()
        command = [str(self._program.find()), *FLAGS]
        seen = child_environment(self._settings, login, folder.path / "home")
        if login.kind == "token":
            seen[TOKEN_VARIABLE] = login.token
            command += [*TOKEN_FLAGS, NO_LOGIN_FLAG]
        elif login.kind == "server":
            command.append(NO_LOGIN_FLAG)
        return command, seen

    async def _prepare(self, process: CopilotRuntime) -> None:
        """Is somebody logged in, and which models are theirs? Costs no money."""
        if self._settings.base_url:
            return
        name = self._settings.name
        try:
            if not is_authenticated(await process.call("auth.getStatus", {})):
                raise ProviderRefused(f"{name}: Copilot does not know who asks: {LOG_IN}")
            if not self._settings.models:
                found = listed_models(await process.call("models.list", {}))
                self.offers = tuple(_offer(*model) for model in found) or self.offers
        except WireError as error:
            raise ProviderUnavailable(f"{name}: {error}") from None
        except Refused as error:
            raise ProviderRefused(f"{error.message} ({LOG_IN})") from None


def _offer(model: str, context: int | None) -> ModelOffer:
    return ModelOffer(id=model, context_length=context, egress=True)
