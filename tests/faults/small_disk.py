"""A real file system of a few megabytes, to fill up or to forbid writing: a tmpfs, as root or in a user namespace."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import tempfile

_PROBE = "mount -t tmpfs -o size=1m tmpfs {0} && umount {0}"


@functools.cache
def way() -> tuple[str, ...] | None:
    """The command prefix under which mounting works here; None where nothing does."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for prefix in (("unshare", "--mount"), ("unshare", "--user", "--map-root-user", "--mount")):
            done = subprocess.run([*prefix, "sh", "-c", _PROBE.format(folder)], capture_output=True, check=False)
            if done.returncode == 0:
                return prefix
    return None
