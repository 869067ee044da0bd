"""Models of the Hugging Face Hub by their name, ORG/NAME or ORG/NAME@REVISION, in huggingface_hub's cache.

Without a network, or with HF_HUB_OFFLINE=1, what the cache holds is used.
"""

import re
from pathlib import Path

from sharegpt4v.errors import UserError

_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)

_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What a model needs: no copy of its weights in another format."""


def hub_name(model: str) -> tuple[str, str | None] | None:
    """Returns repository and revision of a model's name; None for a path, also of a folder that exists."""
    named = _NAME.fullmatch(model)
    if named is None or Path(model).exists():
        return None
    return named["repository"], named["revision"]


def fetch_from_hub(model: str) -> Path:
    """Returns the folder of a model in the cache, and downloads what it lacks.

    The folder's name is the commit. Raises UserError when there is no such model, or no way to it.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = hub_name(model)
    assert named is not None, f"{model} is no name of the Hub"
    repository, revision = named
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(_FILES)))
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hugging Face Hub is out of reach"
        text = f"{model} is no folder here and not in Hugging Face's cache, and {why}: give a folder or a URI"
    except GatedRepoError:
        text = f"{model} is behind a licence: accept it on huggingface.co and set HF_TOKEN"
    except RevisionNotFoundError:
        text = f"{repository} has no revision {revision!r} on the Hugging Face Hub"
    except RepositoryNotFoundError:
        text = (
            f"{model} is no folder here and no model of the Hugging Face Hub, or one that HF_TOKEN must open"
        )
    except HFValidationError:
        text = f"{model} is no folder here and no name of the Hugging Face Hub, which is ORG/NAME[@REVISION]"
    except OSError as error:  # a server that fails, a full disk
        text = f"cannot fetch {model} from the Hugging Face Hub: {' '.join(str(error).split())[:200]}"
    raise UserError(text, field="model")


def pinned(model: str, folder: Path) -> str:
    """Returns the model's name with the commit of its folder, so that every node fetches the same weights."""
    return f"{model.partition('@')[0]}@{folder.name}"
