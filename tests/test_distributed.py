"""Two processes, one training: DistributedDataParallel, FSDP2 and sharded checkpoints of every form of it.

The checks themselves are in distributed_worker.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

WORKER = Path(__file__).with_name("distributed_worker.py")
FORMS = ("sltrain", "low_rank", "maestro", "maestro_independent", "trp", "codes", "refitted")
NAMES = [
    *(f"{kind}-{form}" for form in FORMS for kind in ("start", "ddp")),
    *(f"{kind}-{form}" for form in ("sltrain", "maestro", "trp") for kind in ("fsdp", "resumed")),
    *(f"refused-{form}" for form in ("codes", "refitted")),
    "step_in_backward",
]

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="two processes on a CPU talk by gloo, which this build of torch lacks",
)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """One test, since one start of two processes serves all checks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(WORKER)]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=500)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    found = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    wrong = [
        f"process {rank}, {name}:\n{text}" for rank in (0, 1) for name, text in found[rank].items() if text
    ]
    assert not wrong, "\n".join(wrong)
    assert sorted(found[0]) == sorted(found[1]) == sorted(NAMES)
