"""Privacy, through HTTP and over a hop: what would be widened is refused, with the reason."""

from pathlib import Path

import pytest
from daemons import ECHO, Daemon, mesh, until

pytestmark = pytest.mark.e2e


async def test_privacy_is_refused_rather_than_widened(tmp_path: Path) -> None:
    vendor = Daemon(tmp_path / "vendor", "vendor", ECHO)
    try:
        await vendor.start()
        third_party = (
            '[[providers]]\nkind = "openai_compatible"\nname = "vendor"\nshare = true\n'
            f'base_url = "{vendor.url}/v1"\nmodels = ["echo"]\negress = true\n'
        )
        async with mesh(tmp_path, {"a": third_party, "b": ""}) as (a, b):
            for daemon in (a, b):

                async def answered(daemon: Daemon = daemon) -> bool:
                    answer = await daemon.chat("who?", "echo", promptmesh={"privacy": "any"})
                    return bool(answer.headers.get("x-promptmesh-provider") == "vendor")

                await until(answered, f"{daemon.name} is answered by the third party")
            seen = len(await vendor.json("/mesh/v1/requests"))

            # Also this node's own provider is somebody else's machine.
            for daemon, privacy in ((a, "local"), (a, "mesh"), (b, "mesh")):
                refused = await daemon.chat("secret", "echo", promptmesh={"privacy": privacy})
                assert refused.status_code == 400
                reason = f"a:vendor: privacy is `{privacy}`, and it sends prompts to a third party"
                assert reason in refused.json()["error"]["message"]
            by_header = await b.chat("secret", "echo", headers={"x-promptmesh-privacy": "local"})
            assert by_header.status_code == 400
            assert "privacy is `local`, and it is another machine" in by_header.text
            assert len(await vendor.json("/mesh/v1/requests")) == seen
    finally:
        await vendor.aclose()
