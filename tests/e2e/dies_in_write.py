"""`sivae-dist train`, except that the process kills itself with SIGKILL at the n-th sync of a file to the disk.

Checkpoints sync each of their files, then their folder, then rename: the n decides how much of one is there.
"""

import os
import signal
import sys

from sivae_dist.cli.train import main
from sivae_dist.engine import checkpoint

sync, calls, fatal = checkpoint.sync, 0, int(os.environ["DIE_AT_SYNC"])


def dying_sync(path):
    global calls  # noqa: PLW0603
    calls += 1
    if calls == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(path)


checkpoint.sync = dying_sync
main(sys.argv[1:])
