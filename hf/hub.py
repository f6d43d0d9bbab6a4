"""Downloads from the Hugging Face Hub: the files that are needed, of one commit."""

from pathlib import Path

from system.errors import UserError


def hub_fault(error, repo, revision):
    """What an exception of huggingface_hub means, and what to do."""
    from huggingface_hub import constants, errors

    way = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "check the network"
    said = {  # the first that fits; the classes are nested
        errors.GatedRepoError: "is gated: accept its terms on its page, then set HF_TOKEN",
        errors.RepositoryNotFoundError: "is private or not on the Hub: check the name and HF_TOKEN",
        errors.RevisionNotFoundError: f"has no revision {revision}: check --revision",
        errors.LocalEntryNotFoundError: f"is not all in the cache, and the Hub out of reach: {way}",
        Exception: f"cannot be downloaded ({str(error)[:150]}): try again; whole files are kept",
    }
    return next(words for kind, words in said.items() if isinstance(error, kind))


def hub_folder(repo, revision=None, needed=(), optional=(), kind="model") -> Path:
    """The folder with these files (names or patterns) of a Hub repository, named by its commit.

    What is not cached is downloaded. UserError without network, repository, revision, permission,
    or a needed file, each in its own words.
    """
    from httpx import TransportError
    from huggingface_hub import constants, errors, snapshot_download  # slow, and only needed here

    what = dict(repo_type=kind, revision=revision or None, allow_patterns=[*needed, *optional])
    try:
        try:
            folder = Path(snapshot_download(repo, **what))
        except (TransportError, errors.OfflineModeIsEnabled):
            # Of a pinned commit the library asks the network first, though all may be cached.
            folder = Path(snapshot_download(repo, **what, local_files_only=True))
    except Exception as error:  # several libraries raise here
        raise UserError(f"{repo} {hub_fault(error, repo, revision)}") from None
    if absent := [name for name in needed if not any(folder.glob(name))]:
        where = " in the cache: go online" if constants.HF_HUB_OFFLINE else ": choose another"
        raise UserError(f"{repo} has no {absent[0]} at {folder.name}{where}")
    return folder
