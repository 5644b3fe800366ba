"""Measurements of speed, the tables made from them, and the tuning of kernels.

python -m benchmarks run block_sparse --out benchmarks/results/block_sparse_h200.json
python -m benchmarks table benchmarks/results/*.json
python -m benchmarks readme
python -m benchmarks tune block_sparse_forward --out pallas/tuning/nvidia_h200.json
python -m benchmarks profile block_sparse --shapes 64k
"""

import sys
from collections.abc import Sequence

import tyro

from benchmarks import ops
from benchmarks.profile import profile
from benchmarks.results import run
from benchmarks.table import readme, table
from benchmarks.tune import tune

COMMANDS = {x.__name__: x for x in (run, table, readme, tune, profile)}


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Runs a command and returns its exit code, 2 if there is not what it needs."""
    try:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="python -m benchmarks",
            description=__doc__.splitlines()[0],
            args=arguments,
        )
    except ops.UsageError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
