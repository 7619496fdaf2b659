"""`checkpoint=hf:OWNER/NAME`: downloads the weights of a repository on the Hugging Face Hub."""

from pathlib import Path

from dino_lightning.checkpoints.huggingface import CONFIG, PREPROCESSOR, WEIGHTS
from dino_lightning.errors import UserError

HUB_PREFIX = "hf:"


def download(name: str, *, source: str) -> Path:
    """The weight file of `OWNER/NAME` or `OWNER/NAME@REVISION`, with its settings in the same folder.

    Files are stored in the cache of huggingface_hub; with `HF_HUB_OFFLINE=1` only the cache is used. Raises `UserError`
    if the download fails.
    """
    from huggingface_hub import _CACHED_NO_EXIST, errors, hf_hub_download, try_to_load_from_cache

    repository, _, revision = name.partition("@")

    def file(part: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, part, revision=revision or None))
        except errors.LocalEntryNotFoundError:  # offline, or the Hub did not answer
            if try_to_load_from_cache(repository, part, revision=revision or None) is not _CACHED_NO_EXIST:
                raise
            return None  # an earlier answer says that the file does not exist
        except errors.EntryNotFoundError:
            return None

    try:
        for part in (CONFIG, PREPROCESSOR):
            file(part)
        weights = next(filter(None, map(file, WEIGHTS)), None)
    except errors.HFValidationError as error:
        raise UserError(
            f"{source}: '{name}' is not the name of a repository on the Hugging Face Hub; expected hf:OWNER/NAME or "
            "hf:OWNER/NAME@REVISION."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(
            f"{source}: the Hub has no such repository or revision, or it requires an account (`hf auth login`)."
        ) from error
    except (OSError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: its files could not be downloaded ({reason}).") from error
    if weights is None:
        raise UserError(f"{source}: the repository contains neither {' nor '.join(WEIGHTS)}.")
    return weights
