"""Downloads from the Hugging Face Hub: the files that are needed, of one commit."""

from pathlib import Path

from system.errors import UserError


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form USER/NAME and nothing here is called so."""
    is_path = name[:1] in "./~" or ":" in name or Path(name).exists()  # C:/models
    return name.count("/") == 1 and not is_path


def hub_folder(repo, revision=None, needed=(), optional=(), kind="model") -> Path:
    """Download the files (names or patterns) of a Hub repository that are not cached; return their
    folder, whose name is the commit. UserError without network, repository, revision, permission
    or a needed file, each in its own words."""
    from huggingface_hub import constants, errors, snapshot_download  # slow, and only needed here

    request = dict(repo_type=kind, revision=revision or None, allow_patterns=[*needed, *optional])
    fault = None
    folder = Path("downloaded-nothing")
    try:
        folder = Path(snapshot_download(repo, **request))
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:  # the Hub's own answer
        fault = error
    except Exception as error:  # the network's, other ones in each version: all may be cached
        fault = error
        try:
            folder = Path(snapshot_download(repo, **request, local_files_only=True))
            fault = None if constants.HF_HUB_OFFLINE else error
        except Exception as uncached:
            fault = error if getattr(error, "errno", None) else uncached  # errno: a full disk
    absent = [name for name in needed if not any(folder.glob(name))]
    if fault and (absent or not folder.is_dir()):
        raise UserError(f"{repo} {hub_fault(fault, revision)}")
    if absent:
        way = " in the cache: go online" if constants.HF_HUB_OFFLINE else ": choose another"
        raise UserError(f"{repo} has no {absent[0]} at {folder.name}{way}")
    return folder


def hub_fault(error, revision) -> str:
    """Return what an exception of huggingface_hub means, and what to do about it."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):  # which is a RepositoryNotFoundError, too
        return "is gated: accept its terms on its page, then set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "is private or not on the Hub: check the name and HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision}: check --revision"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        way = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "check the network"
        return f"is not all in the cache, and the Hub out of reach: {way}"
    return f"cannot be downloaded ({str(error)[:150]}): try again; whole files are kept"
