"""The skip check of tests/conftest.py, run on small test suites of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"

SUITE = """
import pytest

def test_passes():
    pass

def test_skips():
    pytest.skip("no reason that counts")

@pytest.mark.skip(reason="marked")
def test_is_marked():
    pass

@pytest.mark.xfail(reason="known", strict=True)
def test_is_expected_to_fail():
    assert False
"""

MODULE_SKIP = 'import pytest\npytest.importorskip("a_module_that_nobody_has")\ndef test_unseen(): pass\n'


def run(
    folder: Path, skips: str, suite: str = SUITE, ci: bool = True, options: tuple[str, ...] = ()
) -> tuple[int, str, str]:
    """(exit status, whole output, closing line) of pytest on `suite` under the project's conftest."""
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "skips.txt").write_text(skips)
    (folder / "test_suite.py").write_text(suite)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "SIVAE_"))} | {"SIVAE_CI": str(int(ci))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "--rootdir", folder, *options, folder],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr, done.stdout.strip().rpartition("\n")[2]


@pytest.mark.parametrize("options", [(), ("-n", "2")])
def test_unlisted_skips_fail_and_the_closing_line_counts_them(tmp_path: Path, options: tuple[str, ...]) -> None:
    """In other processes, too."""
    status, output, closing = run(tmp_path, "# nothing is excused\n", options=options)
    assert status == 1
    # pytest calls a failure outside the test's own body, as that of a mark, an error.
    assert all(part in closing for part in ("1 failed", "1 passed", "1 xfailed", "1 error"))
    assert "test_suite.py::test_skips: skip not on tests/skips.txt: Skipped: no reason that counts" in output


def test_listed_skips_stay_skips(tmp_path: Path) -> None:
    status, _, closing = run(tmp_path, "test_suite.py::test_skips -> needs more\n*is_marked* -> for show\n")
    assert status == 0
    assert "2 skipped" in closing and "failed," not in closing


def test_outside_ci_a_skip_is_a_skip(tmp_path: Path) -> None:
    status, _, closing = run(tmp_path, "", ci=False)
    assert status == 0 and "2 skipped" in closing


def test_processes_share_files_and_keep_those_of_parity_together(tmp_path: Path) -> None:
    suite = "import os, pathlib, pytest\n@pytest.mark.parametrize('n', range(3))\ndef test_it(n):\n"
    suite += "    with open(pathlib.Path(__file__).parents[1] / 'pids', 'a') as f: f.write(f'{os.getpid()}\\n')\n"
    for folder in ("parity", "other"):
        (tmp_path / "tests" / folder).mkdir(parents=True)
        for name in ("a", "b", "c"):
            (tmp_path / "tests" / folder / f"test_{folder}_{name}.py").write_text(suite)
    found = []
    for folder in ("parity", "other"):
        (tmp_path / "tests/pids").write_text("")
        status, *_ = run(tmp_path, "", "", options=("-n", "3", "-k", folder))
        found.append(Counter((tmp_path / "tests/pids").read_text().split()))
        assert status == 0
    assert list(found[0].values()) == [9]
    assert sum(found[1].values()) == 9 and not any(count % 3 for count in found[1].values())
    assert len(found[1]) > 1


@pytest.mark.parametrize(("skips", "status"), [("", 2), ("test_suite.py -> optional library\n", 5)])
def test_a_module_skipped_as_a_whole_is_seen(tmp_path: Path, skips: str, status: int) -> None:
    assert run(tmp_path, skips, MODULE_SKIP)[0] == status


def test_a_line_without_a_reason_is_refused(tmp_path: Path) -> None:
    status, output, _ = run(tmp_path, "test_suite.py::test_skips\n")
    assert status != 0 and "line 1: expected 'pattern -> reason'" in output
