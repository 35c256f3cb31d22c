"""``python -m brim``: the same command line as the script ``brim``."""

from __future__ import annotations

from brim.cli import main

if __name__ == "__main__":
    main()
