"""The broker of a run: `fdbroker serve` itself, with a recorded lender in the lender's place.

    python -m tests.chaos.broker RECORDING PLANTED serve --socket ... --config ...

PLANTED names a mistake to plant (planted.py), or is "-".  The ledger is made as large as the run
needs, so that its bytes can be looked at often.
"""

from __future__ import annotations

import sys

from fdbroker import cli
from fdbroker.daemon import serve

from .planted import plant
from .record import Recorder, recording

ENTRIES = 2048
CELLS = 16384


def main() -> int:
    path, mistake, *arguments = sys.argv[1:]
    recorder = Recorder(path)
    serve.ENTRIES, serve.CELLS = ENTRIES, CELLS
    if mistake != "-":
        plant(mistake)
    serve.Lender = recording(recorder)  # type: ignore[misc]
    try:
        return cli.main(arguments)
    finally:
        recorder.close()


if __name__ == "__main__":
    sys.exit(main())
