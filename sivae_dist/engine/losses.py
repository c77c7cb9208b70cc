"""What reading the data met, over the whole run: slots that got another sample, attempts, the cache. Never silent.

Counts belong to batches that were trained on, not to those that workers have prepared, so that they are a function of
the position and a resumed run has the same.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from pathlib import Path

import torch

from sivae_dist.data import DataConfig
from sivae_dist.data.faults import EVENTS, REASONS, Fault, Report
from sivae_dist.distributed.group import Group
from sivae_dist.engine.logs import log
from sivae_dist.errors import UserError

FOLDER = "quarantine"
_KEPT = 1000  # records in the run folder; what follows is only counted and logged
_LOGGED = 1000  # lines in a rank's log
_NAMES = (*REASONS, *EVENTS)


class DataLosses:
    """Counts of this rank; rank 0 holds those of earlier lives of the run as well. Sums over ranks are the run's."""

    def __init__(self, group: Group, config: DataConfig, folder: Path) -> None:
        self.group, self.config, self.folder = group, config, folder / FOLDER
        self.counts: Counter[str] = Counter()
        self._logged = 0
        self._told: set[str] = set()

    def take(self, report: Report | None) -> None:
        """Counts and tells what a batch brought, which is about to be trained on."""
        if report is None:
            return
        self.counts.update({name: count for name, count in report.counts.items() if name in EVENTS})
        for note in report.notes:
            self._tell(note, note)
        for fault in report.faults:
            self.counts[fault.reason] += 1
            self._logged += 1
            if self._logged <= _LOGGED:
                log.warning("position %d got another sample (%s): %s", fault.position, fault.reason, fault.what)
            self._tell("fault", f"{fault.what}; another sample takes its place. More such are counted as data/skipped")
            if fault.keep:
                self._keep(fault)

    def agree(
        self, failed: bool, asked: bool, report: Report | None, nimg: int, epoch_size: int
    ) -> tuple[bool, bool, UserError | None]:
        """Whether some rank has failed, whether one is asked to stop, and the error if too much would now be lost.

        report: of the batch that is about to be trained on at nimg. Collective, with the same answer on all ranks.
        """
        lost = sum(self.counts[reason] for reason in REASONS) + (len(report.faults) if report else 0)
        numbers = torch.tensor([float(failed), float(asked), float(lost)], dtype=torch.float64)
        any_failed, any_asked, total = self.group.sum_(numbers.to(self.group.device())).tolist()
        allowed = self.config.losses_allowed(nimg, epoch_size)
        return bool(any_failed), bool(any_asked), self._too_many(total, allowed, nimg) if total > allowed else None

    def _too_many(self, total: float, allowed: float, nimg: int) -> UserError:
        return UserError(
            f"{total:.0f} slots of {nimg} images got another sample than theirs, more than data.max_skipped allows "
            f"({allowed:g}); the log of each rank names them",
            "mend the data (`sivae-dist data verify` lists all damage), or raise data.max_skipped",
        )

    def values(self) -> dict[str, float]:
        """The run's counts as tags: data/skipped always, the others once there is something to tell. Collective."""
        total = self._total()
        values = {"data/skipped": float(sum(total[reason] for reason in REASONS))}
        values |= {f"data/skipped_{reason}": float(total[reason]) for reason in REASONS if total[reason]}
        values |= {f"data/{name}": float(total[name]) for name in EVENTS if total[name]}
        return values

    def settle(self) -> None:
        """Gathers the counts of all ranks on rank 0, before it writes them. Collective."""
        total = self._total()
        self.counts = total if self.group.is_main else Counter()

    def state(self) -> dict[str, int]:
        """For a checkpoint (after `settle`, complete on rank 0)."""
        return {name: count for name, count in self.counts.items() if count}

    def load(self, state: dict[str, int]) -> None:
        """Takes up the counts of a checkpoint instead of its own."""
        known = {name: int(count) for name, count in state.items() if name in _NAMES}
        self.counts = Counter(known if self.group.is_main else {})

    def _total(self) -> Counter[str]:
        numbers = torch.tensor(
            [float(self.counts[name]) for name in _NAMES], dtype=torch.float64, device=self.group.device()
        )
        return Counter(dict(zip(_NAMES, map(int, self.group.sum_(numbers).tolist()), strict=True)))

    def _tell(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning(text)
            print(text, file=sys.stderr, flush=True)

    def _keep(self, fault: Fault) -> None:
        """One record, and the bytes, for each sample, however many ranks and lives of the run meet it."""
        name = f"{fault.shard}-{fault.number:06d}"
        record = {"key": fault.key, "shard": fault.shard, "number": fault.number, "reason": fault.reason}
        record |= {"what": fault.what, "position": fault.position}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if sum(1 for _ in self.folder.glob("*.json")) >= _KEPT:
                self._tell("kept", f"{self.folder} holds {_KEPT} records; more are only counted and logged")
                return
            with open(self.folder / f"{name}.json", "x", encoding="utf-8") as file:
                json.dump(record, file, indent=1)
            if fault.data:
                (self.folder / f"{name}.{fault.image_format}").write_bytes(fault.data)
        except FileExistsError:
            return
        except OSError as error:
            with contextlib.suppress(OSError):
                (self.folder / f"{name}.json").unlink()
            self._tell("quarantine", f"cannot write {self.folder}: {error.strerror}; bad samples are not kept")
