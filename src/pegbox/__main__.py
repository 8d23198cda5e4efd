"""`python -m pegbox`, which `torchrun -m pegbox` needs."""

from __future__ import annotations

from pegbox.cli import main

if __name__ == "__main__":
    main()
