"""Upload an exported directory to the Hugging Face Hub."""

from pathlib import Path

from mlx_grpo.core.commands import command
from mlx_grpo.core.errors import InputError, one_line


def check_push(repo: str) -> None:
    """Find out before the long work whether an upload can succeed.

    Raises:
        InputError: not a repository's name, nobody is logged in, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        HfApi().whoami()
    except HFValidationError:
        raise InputError(f"--push {repo}: not a repository's name, as in 'owner/name'") from None
    except LocalTokenNotFoundError:
        raise InputError(f"--push {repo}: nobody is logged in; type: hf auth login") from None
    except Exception as e:  # each HTTP library below the Hub's has errors of its own
        raise InputError(f"--push {repo}: the Hub does not let you in ({one_line(e)})") from None


def push(directory: Path, repo: str, private: bool) -> str:
    """Create the repository if it is not there, upload the directory; returns the address.

    Raises:
        InputError: the Hub refused or broke off; the directory stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=directory,
            commit_message=f"Upload {directory.name}",
            # weights of an earlier upload would be read beside these
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    except Exception as e:  # as above
        raise InputError(
            f"--push {repo}: the upload failed ({one_line(e)}); {directory} is complete, try "
            f"again with: {command('hf', 'upload', repo, directory)}"
        ) from None
    return str(address)
