"""`sivae-dist train`, except that numbers of one rank are spoilt where POISONS says, and every iteration is recorded.

POISONS: JSON list of {"what": "data" | "gradient of the PLAYER", "rank": r, "at": [first, last + 1], "salts": [...]};
`at` in images before the iteration; without `salts` whatever the salt. RECORD: one JSON line an iteration and rank goes
into RECORD-RANK.jsonl, with hashes of weights and buffers before and after it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from sivae_dist.cli.train import main
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine.iteration import Iteration

POISONS = json.loads(os.environ["POISONS"])
RECORD = os.environ.get("RECORD")
call, reduce = Iteration.__call__, Replicated.reduce
active: set[str] = set()


def digest(tensors) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def state(model) -> dict[str, str]:
    players = {"encoder": model.encoder, "decoder": model.decoder}
    return {
        **{f"weights of the {name}": digest(player.parameters()) for name, player in players.items()},
        **{f"buffers of the {name}": digest(player.buffers()) for name, player in players.items()},
    }


def poisoned_call(self, batch, *, nimg, **options):
    rank = self.strategy.group.rank
    active.clear()
    active.update(
        poison["what"]
        for poison in POISONS
        if poison["rank"] == rank
        and poison["at"][0] <= nimg < poison["at"][1]
        and self.salt in poison.get("salts", [self.salt])
    )
    if "data" in active:
        batch.x[0, 0, 0, 0] = torch.nan
    before = state(self.model)
    report = call(self, batch, nimg=nimg, **options)
    if RECORD:
        row = {"nimg": nimg, "salt": self.salt, "x": digest([batch.x]), "before": before, "after": state(self.model)}
        with Path(f"{RECORD}-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    return report


def poisoned_reduce(self, name, **options):
    if f"gradient of the {name}" in active:
        gradient = next(self.players[name].parameters()).grad
        gradient[(0,) * gradient.dim()] = torch.inf
    return reduce(self, name, **options)


Iteration.__call__, Replicated.reduce = poisoned_call, poisoned_reduce
if __name__ == "__main__":
    main(sys.argv[1:])
