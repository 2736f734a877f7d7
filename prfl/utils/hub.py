"""What the Hugging Face hub says, in words of what to do: its libraries' own messages are long."""

from __future__ import annotations

from collections.abc import Iterator

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from prfl.utils.errors import PrflError


def causes(error: BaseException) -> Iterator[BaseException]:
    """List an error and those that led to it, the last one first."""
    met: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in met:
        met.add(id(now))
        yield now
        now = now.__cause__ or now.__context__


def hub_error(name: str, error: Exception, kind: str) -> PrflError:
    """Make the error of a hub id that cannot be loaded.  kind: what it should be, as "diffusers pipeline"."""
    fix = f"give a folder, or the hub id (owner/name) of a {kind}"
    for cause in causes(error):
        if isinstance(cause, GatedRepoError):
            fix = f"accept its terms at https://huggingface.co/{name}, then log in with `hf auth login`"
            return PrflError("the hub gives it only to those who accept its terms", where=name, fix=fix)
        if isinstance(cause, RevisionNotFoundError):
            return PrflError("it has no such revision on the hub", where=name, fix="name a revision that it has")
        if isinstance(cause, RepositoryNotFoundError):
            fix += "; for a private one log in with `hf auth login`"
            return PrflError("no folder here, and no such repository on the hub", where=name, fix=fix)
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status = f"{cause.response.status_code} {cause.response.reason_phrase}".rstrip()
            return PrflError(f"the hub answers {status}", where=name, fix=f"try again later, or {fix}")
    what = "no folder here, not in the hub's cache, and the hub cannot be reached"
    return PrflError(what, where=name, fix=f"{fix}; without a network, the folder that it was downloaded to")
