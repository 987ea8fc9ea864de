"""What a command measured: printed, compared with an earlier model's, and written down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsds.commands.configs import FILE_NAME, config_text, say, writing
from fastsds.data.files import require_writable
from fastsds.evaluation.compare import compare
from fastsds.evaluation.outcomes import OUTCOMES_FILE, Outcomes, read_outcomes
from fastsds.evaluation.tables import comparison_table, results_table, write_results


def check_places(out: Path | None, before: Path | None) -> None:
    """Before anything is measured, whether what is measured can be compared and written.

    Raises:
        DataError: `before` holds no outcomes.
        FileExistsError: `out` is something other than a folder of results.
        PermissionError: `out` cannot be written.
    """
    if before is not None:
        read_outcomes(before)
    if out is None:
        return
    require_writable(out)
    if not out.exists() or (out / OUTCOMES_FILE).is_file():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise FileExistsError(f"out: {out} exists and holds no results; name another folder")


def save_results(
    out: Path | None,
    outcomes: Outcomes,
    *,
    before: Path | None = None,
    description: Mapping[str, Any] | None = None,
    config: Any = None,
    command: str = "",
    files: Mapping[str, str] | None = None,
) -> None:
    """Prints the table of `outcomes`, and their difference to those in the folder `before`; writes both as `out`.

    Args:
        out: folder of `results.md`, `results.json`, `results.csv`, `outcomes.json` and `config.yaml`.
        config: of the `command`, or None where it is saved elsewhere.
        files: more files of the folder, by their names.

    Raises:
        DataError: `before` holds no outcomes.
        ValueError: it holds those of other samples, or `out` holds other files than results. What was measured is
            printed and written all the same.
        OSError: `out` cannot be written; what was measured is printed all the same.
    """
    earlier = None if before is None else read_outcomes(before)
    say(results_table(outcomes))
    texts = dict(files or {}) | ({} if config is None else {FILE_NAME: config_text(config, command)})
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in (description or {}).items()}
    if out is not None:
        with writing(out):
            write_results(out, outcomes, description=plain, files=texts)
        say(f"results: {out / 'results.md'}")
    if earlier is None:
        return
    comparison = compare(earlier, outcomes)
    say(f"before ({before}) and after:\n\n{comparison_table(comparison)}")
    if out is not None:
        with writing(out):
            write_results(out, outcomes, comparison=comparison, description=plain, files=texts)
