"""The command line: which commands there are, how one is found and run, and how an error is told."""

from __future__ import annotations

import difflib
import inspect
import io
import os
import select
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    """A command; its module is imported when it is asked for, so that the others cost nothing."""

    module: str
    """In `fastsds.commands`."""
    config: str
    """The dataclass of its options, in that module."""
    run: str
    """The function of a config, in that module."""
    summary: str


COMMANDS = {
    "demo": Command(
        "demos", "DemoConfig", "run_demo", "distil the toy teacher into the toy CLIP and report: minutes, no download"
    ),
    "intcoop-demo": Command(
        "demos", "IntCoOpDemoConfig", "run_intcoop_demo", "prompt-tune the toy CLIP and report: minutes, no download"
    ),
    "toyworld": Command(
        "toyworld",
        "ToyWorldConfig",
        "run_toyworld",
        "write the toy world as files: COCO captions, Winoground, few shots",
    ),
    "distill": Command(
        "distill", "DistillRun", "run_distill", "distil a text-to-image diffusion model into CLIP (SDS-CLIP)"
    ),
    "intcoop": Command(
        "intcoop", "IntCoOpRun", "run_intcoop", "prompt-tune CLIP with predicted attributes (IntCoOp), or a baseline"
    ),
    "attributes": Command(
        "attributes", "AttributesConfig", "run_attributes", "ask BLIP-2 for an attribute of every training image"
    ),
    "evaluate winoground": Command(
        "evaluate", "WinogroundEvaluation", "run_winoground", "text, image and group score on Winoground"
    ),
    "evaluate aro": Command("evaluate", "AroEvaluation", "run_aro", "relations, attributes and word order by ARO"),
    "evaluate sugarcrepe": Command(
        "evaluate", "SugarCrepeEvaluation", "run_sugarcrepe", "captions against fluent wrong ones, seven splits"
    ),
    "evaluate zeroshot": Command(
        "evaluate", "ZeroShotEvaluation", "run_zeroshot", "classification by prompt templates"
    ),
    "evaluate retrieval": Command(
        "evaluate", "RetrievalEvaluation", "run_retrieval", "images by captions and captions by images, R@1, 5, 10"
    ),
    "evaluate base-to-novel": Command(
        "base_to_novel", "BaseToNovelEvaluation", "run_base_to_novel", "a prompt-tuning run on base and novel classes"
    ),
    "evaluate diffusion-score": Command(
        "diffusion_score",
        "DiffusionScoreEvaluation",
        "run_diffusion_score",
        "the diffusion model as the judge of these",
    ),
    "export": Command(
        "export",
        "ExportConfig",
        "run_export",
        "write a distilled CLIP for open_clip or transformers, or its tensors alone",
    ),
    "info": Command(
        "info", "InfoConfig", "run_info", "print versions, devices, and for every op the backend that serves it and why"
    ),
}

_GENERAL = (
    ("--config FILE.yaml", "options from a file; those on the command line override it"),
    ("--debug", "show the traceback of an error"),
    ("--help", "of fastsds, or of a command"),
    ("--version", ""),
)
_OUTPUT = 1  # standard output's file descriptor
_BROKEN_PIPE = 141  # as shells have it for SIGPIPE
_python_format = warnings.formatwarning


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status: 0, 1 where something failed (one line on standard error says what), 2 where the command line
        does not serve, 130 where the user interrupted, 141 where who reads the output has gone.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    _speak_any_language()
    if not debug:
        _hush_libraries()
    try:
        status = _run(words)
        sys.stdout.flush()
        return status
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt as error:
        _complain(str(error) or "interrupted")
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return _BROKEN_PIPE
        if debug:
            traceback.print_exc()
        else:
            _complain(_one_line(error))
        return 1


def _speak_any_language() -> None:
    """A character that a terminal's encoding lacks is spelt by its number, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _hush_libraries() -> None:
    """Leaves out what libraries say of how they call one another, and what the one line of an error says again.

    Warnings of fastsds are one line, as its errors are.
    """
    warnings.formatwarning = _format_warning
    warnings.filterwarnings("ignore", category=FutureWarning, module="open_clip")
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def _run(words: Sequence[str]) -> int:
    name, rest = _find(words)
    if name not in COMMANDS:
        return _overview(name, rest)
    from fastsds.commands.configs import UsageError, parse

    command = COMMANDS[name]
    module = import_module(f"fastsds.commands.{command.module}")
    kind = getattr(module, command.config)
    try:
        config = parse(kind, rest, command=name, description=_description(kind))
    except UsageError as error:
        _complain(str(error))
        return 2
    getattr(module, command.run)(config)
    return 0


def _find(words: Sequence[str]) -> tuple[str, list[str]]:
    """The longest beginning that names a command or a group of commands, and the rest."""
    known = {" ".join(name.split()[:length]) for name in COMMANDS for length in (1, 2)}
    for length in (2, 1):
        if len(words) >= length and " ".join(words[:length]) in known:
            return " ".join(words[:length]), list(words[length:])
    return "", list(words)


def _overview(group: str, rest: Sequence[str]) -> int:
    """Lists the commands, or those of a group; a word that names none is an error."""
    prefix = f"{group} " if group else ""
    below = {name.removeprefix(prefix): COMMANDS[name].summary for name in COMMANDS if name.startswith(prefix)}
    if rest and rest[0] == "--version":
        from fastsds import __version__

        print(f"fastsds {__version__}")
        return 0
    if rest and rest[0] not in ("--help", "-h"):
        close = difflib.get_close_matches(rest[0], [*below, *(name.split()[0] for name in below)], n=1)
        hint = f"did you mean {prefix}{close[0]}?" if close else f"see fastsds {prefix}--help"
        _complain(f"{prefix}{rest[0]}: there is no such command; {hint}")
        return 2
    print(f"usage: fastsds {prefix}COMMAND [OPTIONS]\n\ncommands:")
    _print_columns(list(below.items()))
    print("\noptions:")
    _print_columns(_GENERAL)
    print(f"\nfastsds {prefix}COMMAND --help shows a command's options, with examples.")
    return 0 if rest else 2


def _description(config: type) -> str:
    """What the command does, with examples where the docstring has them."""
    general = "Every option can also stand in a YAML file: --config FILE.yaml, overridden by the command line."
    return f"{inspect.cleandoc(config.__doc__ or '')}\n\n{general}"


def _print_columns(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(left) for left, _ in rows)
    for left, right in rows:
        print(f"  {left:{width}}  {right}".rstrip())


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    if isinstance(error, ValueError | RuntimeError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}; --debug shows where".replace(": ;", ";")


def _nobody_reads() -> bool:
    """Whether who reads the output has gone; the rest of it is dropped then, or Python would complain at its end."""
    poll = select.poll()
    poll.register(_OUTPUT, 0)  # asks for what comes unasked: errors
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), _OUTPUT)
    return True


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if Path(filename).is_relative_to(Path(__file__).parent):
        return f"fastsds: {message}\n"
    return _python_format(message, category, filename, lineno, line)


def _complain(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    who = "fastsds" if rank == "0" else f"fastsds, process {rank}"
    print(f"{who}: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
