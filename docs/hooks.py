"""Brings the benchmarks' plots into the site, under the paths by which the pages show them on GitHub, too."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel


def on_files(files: Files, config: Any) -> Files:
    for plot in sorted((Path(config.config_file_path).parent / "benchmarks" / "results").glob("*.png")):
        source = f"../benchmarks/results/{plot.name}"
        file = File.generated(config, source, abs_src_path=str(plot), inclusion=InclusionLevel.INCLUDED)
        file.dest_uri = f"plots/{plot.name}"
        files.append(file)
    return files
