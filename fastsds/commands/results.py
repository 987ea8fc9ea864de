"""What a command measured: printed, compared with an earlier model's, and written down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsds.commands.configs import FILE_NAME, config_text, say
from fastsds.evaluation.compare import compare
from fastsds.evaluation.outcomes import Outcomes, read_outcomes
from fastsds.evaluation.tables import comparison_table, results_table, write_results


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
        ValueError: it holds those of other samples, or `out` holds other files than results.
    """
    comparison = None if before is None else compare(read_outcomes(before), outcomes)
    say(results_table(outcomes))
    if comparison is not None:
        say(f"before ({before}) and after:\n\n{comparison_table(comparison)}")
    if out is None:
        return
    texts = dict(files or {}) | ({} if config is None else {FILE_NAME: config_text(config, command)})
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in (description or {}).items()}
    write_results(out, outcomes, comparison=comparison, description=plain, files=texts)
    say(f"results: {out / 'results.md'}")
