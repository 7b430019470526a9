"""``python -m shortft`` and ``accelerate launch -m shortft``."""

import sys

from shortft.cli import main

sys.exit(main())
