"""`python -m orpo_kernels` is `orpo-kernels`."""

import sys

from .app.cli import main

if __name__ == "__main__":
    sys.exit(main())
