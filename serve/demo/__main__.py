"""`python -m serve.demo`."""

import sys

from serve.demo import main

if __name__ == "__main__":
    sys.exit(main())
