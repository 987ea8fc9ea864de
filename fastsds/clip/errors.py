"""What open_clip, transformers and PyTorch raise on loading a model, in one line."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


class ClipSourceError(ValueError):
    """A CLIP model cannot be loaded from where it is said to be; the message says what to change, in one line."""


class ClipFormatError(ClipSourceError):
    """One format of CLIP models cannot hold what another does; the message names what."""


@contextmanager
def one_line_errors(subject: str) -> Iterator[None]:
    """Turns the libraries' errors into a `ClipSourceError` that begins with `subject`."""
    try:
        yield
    except ClipSourceError:
        raise
    except SafetensorError as error:
        raise ClipSourceError(
            f"{subject}: is no whole safetensors file, but perhaps git-lfs's pointer to one or an unfinished download: "
            f"{first_line(error)}"
        ) from error
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):
            raise ClipSourceError(
                f"{subject}: is no checkpoint that torch.save wrote; safetensors need the suffix .safetensors"
            ) from error
        raise ClipSourceError(
            f"{subject}: expected tensors alone, got a pickle that weights_only loading refuses to run; "
            f"save its state dict as safetensors where you trust it"
        ) from error
    except (RuntimeError, OSError, EOFError, ImportError, ValueError) as error:
        if misfits := _misfits(str(error)):
            raise misfit_error(subject, misfits) from error
        if "TorchScript archive" in str(error):
            raise ClipSourceError(
                f"{subject}: expected tensors alone, got a TorchScript archive, which is code; OpenAI's models load by "
                f"the tag openai, others once their state dict is saved as safetensors"
            ) from error
        raise ClipSourceError(f"{subject}: could not be loaded: {first_line(error)}") from error


def misfit_error(subject: str, misfits: list[str]) -> ClipSourceError:
    """Says how many tensors do not fit the model, and the first of them."""
    first = ", ".join(misfits[:3]) + (", …" if len(misfits) > 3 else "")
    return ClipSourceError(f"{subject}: {len(misfits)} tensors do not fit the model: {first}")


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _misfits(message: str) -> list[str]:
    """The tensors that `Module.load_state_dict` complains of."""
    found = []
    for line in message.splitlines():
        for start, what in (("Missing key(s)", "missing"), ("Unexpected key(s)", "unexpected")):
            if line.strip().startswith(start):
                found += [f"{name} ({what})" for name in re.findall(r'"([^"]+)"', line)]
        if size := re.match(r"\s*size mismatch for ([^:]+):.*?\[([\d, ]*)\].*?\[([\d, ]*)\]", line):
            name, stored, expected = size.groups()
            found.append(f"{name} ([{stored}], expected [{expected}])")
    return found
