"""`python -m fastsds`, and so `accelerate launch -m fastsds`."""

from __future__ import annotations

import sys

from fastsds.cli import main

if __name__ == "__main__":
    sys.exit(main())
