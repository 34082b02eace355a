"""``python -m pronk``."""

import sys

from pronk.cli import main

if __name__ == "__main__":
    sys.exit(main())
