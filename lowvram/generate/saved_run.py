"""The run that a checkpoint is of, and whether its weights are that run's; loads no model."""

from __future__ import annotations

from pydantic import ValidationError

import lowvram
from lowvram.config.run import RunConfig
from lowvram.config.run_file import from_portable
from lowvram.errors import CheckpointError, ConfigError
from lowvram.generate.weights import CheckpointReader, refuse_other_tensors
from lowvram.storage.checkpoint import Checkpoint
from lowvram.storage.manifest import CONFIG, OtherVersionError

# What pydantic calls a key, a kind or a choice that this version does not know.
_LATER = ("extra_forbidden", "union_tag_invalid", "literal_error")


def saved_config(checkpoint: Checkpoint) -> RunConfig:
    """Return the run that a checkpoint is of.

    Raises CheckpointError where there is no such run; OtherVersionError where another lowvram wrote it, which may know
    more keys and choices than this one.  A version number alone does not tell: it is the same for many commits.
    """
    is_later = False
    try:
        return from_portable(checkpoint.config(), checkpoint.directory.parent)
    except ValidationError as error:
        problems = error.errors()
        problem = next((one for one in problems if one["type"] in _LATER), problems[0])
        is_later = problem["type"] in _LATER
        why = f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}."
    except (ConfigError, AttributeError, TypeError) as error:  # a text or a list where a table belongs
        why = f"{error}."
    what = f"{checkpoint.directory / CONFIG} describes a run that this lowvram does not know."
    version = checkpoint.manifest["versions"].get("lowvram", "")
    if is_later or version != lowvram.__version__:
        which = f" to {version}, which wrote it" if version not in ("", lowvram.__version__) else ""
        raise OtherVersionError(what, why, f"Update lowvram{which}.")
    raise CheckpointError(what, f"{why} This version wrote it, so it was altered.")


def check_readable(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where a checkpoint's weights are not those of the model that it describes."""
    refuse_other_tensors(CheckpointReader(checkpoint, saved_config(checkpoint).model))
