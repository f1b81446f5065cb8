"""`python -m flowrl …` is `flowrl …`."""

import sys

from flowrl.cli.main import main

sys.exit(main())
