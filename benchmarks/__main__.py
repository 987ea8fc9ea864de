"""`python -m benchmarks`: runs the suites, prints one table, and writes a JSON file and a plot.

What is no whole run is written only where `--out` says, so that it does not take the place of the whole one's record.
The exit status says whether every suite's correctness gate held, not whether every bar is met; the table says that.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks import report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--extent", choices=("full", "bars", "tiny"), default="full")
    parser.add_argument("--quick", action="store_const", const="bars", dest="extent", help="the bars alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--out", type=Path, help="folder of the JSON file and the plot; a whole run has one of its own")
    parser.add_argument("--only", default="", help="part of a suite's name, as pytest's -k takes it")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "benchmarks.json")
        status = pytest.main(
            [
                str(Path(__file__).parent), "-q", "--durations=0", "-p", "no:cacheprovider", "--benchmark-quiet",
                f"--benchmark-json={figures}", f"--extent={options.extent}", f"--device={options.device}",
                f"--threads={options.threads}", "-k", options.only,
            ]
        )  # fmt: skip
        if not figures.exists() or not figures.read_text(encoding="utf-8"):
            return int(status) or 1
        records = report.collect(figures)
    where = report.machine(options.device, options.threads)
    print(f"\n{report.machine_line(where)}\n\n{report.tables(records)}")
    out = options.out or (report.RESULTS if options.extent == "full" and not options.only else None)
    if out is None:
        print("not written: --out FOLDER keeps what is no whole run")
    else:
        document, picture = report.write(records, where, out)
        print(f"written: {document}, {picture}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
