"""``python -m fdbroker``: the same as the command."""

import sys

from fdbroker.cli import main

if __name__ == "__main__":
    sys.exit(main())
