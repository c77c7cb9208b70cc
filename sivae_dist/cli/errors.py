"""The boundary where a UserError becomes a message and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from sivae_dist.errors import UserError


def guarded(command: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Runs a command; a UserError is printed without a traceback and ends the process with status 2.

    Under several processes the message names the rank, and ranks whose message would only repeat rank 0's still end
    with the same status.
    """
    try:
        command(arguments)
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        prefix = f"error (rank {rank})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "error"
        print(f"{prefix}: {error.what}", *([f"  fix: {error.fix}"] if error.fix else []), sep="\n", file=sys.stderr)
        sys.stderr.flush()
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os._exit(0)
