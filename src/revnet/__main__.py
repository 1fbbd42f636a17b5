"""`python -m revnet`: the `revnet` command."""

import sys

from revnet.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
