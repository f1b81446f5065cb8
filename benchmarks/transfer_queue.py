"""The queue beside its rivals: `python benchmarks/transfer_queue.py …` is `benchmarks/queue_speed.py …`.

Its name is that of a package, and the benchmarks beside it have this folder first on their path: whoever imports this
file by that name gets the package.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    sys.path[:1] = [str(HERE.parent)]
    sys.path.append(str(HERE))
    from queue_speed import main

    sys.exit(main())
elif __name__ == "transfer_queue":
    beside = [entry for entry in sys.path if Path(entry).resolve() == HERE]
    sys.path[:] = [entry for entry in sys.path if entry not in beside]
    del sys.modules[__name__]
    importlib.import_module(__name__)
    sys.path[:0] = beside
