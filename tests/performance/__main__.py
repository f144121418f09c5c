"""`python -m tests.performance`."""

import sys

from tests.performance.bench import main

if __name__ == "__main__":
    sys.exit(main())
