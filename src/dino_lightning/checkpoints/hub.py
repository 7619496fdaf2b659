"""`checkpoint=hf:OWNER/NAME`: a repository of the Hugging Face Hub as files on this machine."""

from pathlib import Path

from dino_lightning.checkpoints.huggingface import CONFIG, PREPARATION, WEIGHTS
from dino_lightning.errors import UserError

HUB_PREFIX = "hf:"


def download(name: str, *, source: str) -> Path:
    """The file of weights of `OWNER/NAME` or `OWNER/NAME@REVISION`, its settings beside it.

    Kept where huggingface_hub keeps files, and not asked for again with `HF_HUB_OFFLINE=1`. Raises `UserError` where
    it does not come.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = name.partition("@")

    def file(part: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, part, revision=revision or None))
        except LocalEntryNotFoundError:  # the Hub was not asked, or has not answered
            if try_to_load_from_cache(repository, part, revision=revision or None) is not _CACHED_NO_EXIST:
                raise
            return None  # as it answered before
        except EntryNotFoundError:
            return None

    try:
        for part in (CONFIG, PREPARATION):
            file(part)
        found = next(filter(None, map(file, WEIGHTS)), None)
    except HFValidationError as error:
        raise UserError(
            f"{source}: '{name}' names no repository of the Hugging Face Hub; expected hf:OWNER/NAME, or "
            "hf:OWNER/NAME@REVISION."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(
            f"{source}: the Hub has no such repository or revision, or does not show it without an account "
            "(`hf auth login`)."
        ) from error
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: its files could not be downloaded ({reason}).") from error
    if found is None:
        raise UserError(f"{source}: the repository has neither of {', '.join(WEIGHTS)}.")
    return found
