"""One rank of a run: python -m vitexp.worker config.yaml, started by vitexp.launch."""

from __future__ import annotations

import sys
from pathlib import Path

from vitexp.launch import exit_code_of


def main() -> None:
    def work() -> None:
        from vitexp.config import from_request
        from vitexp.train import train

        train(from_request(Path(sys.argv[1])))

    sys.exit(exit_code_of(work))


if __name__ == "__main__":
    main()
