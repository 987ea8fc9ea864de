"""Whether a file is on the Hugging Face hub, asked once: its library asks again for half a minute where it cannot."""

from __future__ import annotations

from pathlib import Path


class NotOnHubError(OSError):
    """The file was never fetched, and the hub is out of reach or has it not; the message says which, in one line."""


def is_fetched(identifier: str, filename: str, cache_dir: Path | None = None) -> bool:
    """Whether it lies in the cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(identifier, filename, cache_dir=cache_dir), str)


def require_on_hub(identifier: str, filename: str) -> None:
    """
    Raises:
        NotOnHubError: it is not there, or the hub does not answer.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(identifier, filename))
    except Exception as error:  # of the library's and of whichever HTTP client it has
        raise NotOnHubError(" ".join(str(error).split())) from error
