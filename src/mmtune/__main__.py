"""``python -m mmtune`` and ``torchrun -m mmtune``: the command line."""

import sys

from mmtune.command_line.app import main

if __name__ == "__main__":
    sys.exit(main())
