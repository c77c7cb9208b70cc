"""Started by test_house_launch under accelerate: writes what a process sees of the others to FOLDER/RANK.json."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

accelerator = Accelerator()
total = torch.tensor([accelerator.process_index + 1.0])
if accelerator.num_processes > 1:
    torch.distributed.all_reduce(total)
seen = {
    "processes": accelerator.num_processes,
    "device": accelerator.device.type,
    "backend": torch.distributed.get_backend() if accelerator.num_processes > 1 else None,
    "sum": total.item(),
}
Path(sys.argv[1], f"{accelerator.process_index}.json").write_text(json.dumps(seen))
# Without the barrier a process now and then aborts on the way out.
accelerator.wait_for_everyone()
accelerator.end_training()
