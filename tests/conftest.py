"""For all tests: under SIVAE_CI=1 a skip that tests/skips.txt does not excuse is a failure; what one process runs when
several share the tests.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

SKIPS = Path(__file__).parent / "skips.txt"
TOGETHER = ("tests/parity/",)  # in one process, as the last of them counts what the others have compared


def excused(lines: str) -> dict[str, str]:
    """{pattern: reason} of the text of a skips file. Raises ValueError on a line without a reason."""
    found = {}
    for number, line in enumerate(lines.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        pattern, arrow, reason = (part.strip() for part in line.partition("->"))
        if not (pattern and arrow and reason):
            raise ValueError(f"tests/skips.txt, line {number}: expected 'pattern -> reason', found {line!r}")
        found[pattern] = reason
    return found


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("SIVAE_CI") == "1":
        config.pluginmanager.register(SkipCheck(excused(SKIPS.read_text())), "sivae-skip-check")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file stay in one process (they share what it takes long to make), those of TOGETHER, too."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((folder for folder in TOGETHER if nodeid.startswith(folder)), super()._split_scope(nodeid))

    return ByFile(config, log)


class SkipCheck:
    """Turns unexcused skips into failures, so that pytest's closing line and exit status tell of them."""

    def __init__(self, allowed: dict[str, str]) -> None:
        self.allowed = allowed

    def _judge(self, report: Any) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        if any(fnmatch.fnmatchcase(report.nodeid, pattern) for pattern in self.allowed):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: skip not on tests/skips.txt: {reason}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        report = yield
        self._judge(report)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self) -> Generator[None, Any, Any]:
        report = yield
        self._judge(report)
        return report
