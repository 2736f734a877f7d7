"""Upload of an exported folder, by huggingface_hub's own client; who uploads is whoever ran ``hf auth login``."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from prfl.errors import PrflError


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Make the repository ``owner/name`` where there is none and upload the folder; returns the commit's address.

    Raises PrflError when the hub refuses, cannot be reached, or the name is none.
    """
    api = HfApi(library_name="prfl")
    try:
        repo_id = api.create_repo(repo, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload with prfl export")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PrflError(
            f"cannot be uploaded ({type(error).__name__}): {reason}",
            where=f"--push {repo}",
            fix=f"log in with `hf auth login` and a token that may write; what was exported is whole in {folder}",
        ) from error
    return str(commit.commit_url)
