"""``python -m headpatch`` is ``headpatch``."""

from __future__ import annotations

import sys

from headpatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
