"""`python -m loralign` is the command `loralign`."""

import sys

from loralign.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
