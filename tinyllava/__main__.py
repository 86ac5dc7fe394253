"""``python -m tinyllava``: the command line."""

import sys

from tinyllava.cli import main

if __name__ == "__main__":
    sys.exit(main())
