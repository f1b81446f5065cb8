"""An engine that is only its weights: `python -m tests.weights.engine_process NAME NUM_RANKS OUT_DIR HOW`.

Receives what is published in OUT_DIR, version after version, until a file `end` is there, and saves each beside it.
HOW: `follow`; `check`, the first version with corruption and comparison; `check-skips`, so by an engine that puts one
tensor nowhere; `die-N` or `hang-N`, when the Nth is open.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from flowrl.weights.collective import receiver as receiver_module
from flowrl.weights.collective.giver import Terms
from flowrl.weights.collective.receiver import Receiver
from flowrl.weights.collective.rounds import Landing
from tests.weights.rank_process import Model

BUCKET_BYTES = 64  # many rounds, and tensors cut over several


SKIPPED = "layers.1.wide"
land = receiver_module._land


def land_all_but_one(landing: Landing, given: torch.Tensor) -> None:
    if landing.name != SKIPPED:
        land(landing, given)


def main(name: str, num_ranks: int, out: Path, how: str) -> None:
    torch.set_num_threads(1)
    if how == "check-skips":
        receiver_module._land = land_all_but_one
    tensors = Model().to(torch.bfloat16).state_dict(keep_vars=True)
    timeout_s = float(os.environ.get("TIMEOUT_S", "20"))
    receiver = Receiver(
        name,
        num_ranks,
        bind=f"ipc://{out}/socket-{name}-{os.getpid()}",
        directory=out,
        address="",
        bucket_bytes=BUCKET_BYTES,
        terms=Terms(torch.device("cpu"), "", timeout_s),
        is_over=(out / "end").exists,
    )
    news = {field: getattr(receiver.news, field) for field in receiver.news.__struct_fields__}
    (out / f"new-{name}").write_text(json.dumps(news))
    (out / f"new-{name}").rename(out / f"engine-{name}-{os.getpid()}.json")
    assert receiver.meet()
    last, count = -1, 0
    while not (out / "end").exists():
        version = max((int(path.name.removeprefix("published-")) for path in out.glob("published-*")), default=-1)
        if version <= last:
            time.sleep(0.002)
            continue
        if how.startswith("check") and last < 0:
            assert receiver.check(version, tensors)
        elif not receiver.open(version):
            continue
        else:
            count += 1
            if how == f"die-{count}":
                os._exit(9)
            if how == f"hang-{count}":
                time.sleep(1000)
            receiver.receive(tensors)
        last = version
        saving = out / f"saving-{name}"  # engines save at the same moment
        save_file({key: tensor.detach() for key, tensor in tensors.items() if key != "head.weight"}, saving)
        saving.rename(out / f"served-{name}-{version}.safetensors")
    receiver.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
