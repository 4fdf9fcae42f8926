"""The command line: `promptmesh COMMAND`. Each command is one short function in a `cli_*` module.

Exit codes: 0 done, 1 failed (a sentence on stderr), 2 wrong usage, 130 stopped by Ctrl-C. Data goes
to stdout, everything else to stderr. Nothing heavy is imported before a command needs it: the
network and the models belong to `up`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .cli_mesh import typed
from .cli_output import fail, prepare_streams
from .cli_parser import parser
from .client import NodeError, NodeNotRunning
from .config_values import ConfigError
from .home import HomeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and give its exit code."""
    prepare_streams()
    args = parser().parse_args(arguments)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        for problem in error.problems:
            fail(problem)
        return 2
    except NodeNotRunning as error:
        return fail(f"{error}. Start it with `{typed(args, 'up')}`")
    except (HomeError, NodeError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Who read our output has gone (`| head`). Python would complain of it once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
