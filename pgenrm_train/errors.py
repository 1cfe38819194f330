"""Errors that a user can mend.

    PGenRMError                 one clear sentence on stderr, exit code 2, no traceback
    ├── ConfigError             a key, value or combination of the configuration (also a ValueError)
    ├── DataError               a file, row or field that differs from what was expected (also a ValueError)
    ├── ArtifactError           a run folder, checkpoint or cache that is missing, foreign or half-written
    ├── PreflightError          the machine lacks what the run needs: memory, disk, port, package, device
    ├── BackendError            an engine or server failed in a way that stopped the stage
    │   └── EngineLostError     it died or made no progress: a restart from the newest checkpoint may succeed
    │       └── NodeLostError   a node of the cluster left: the stage continues once the node is back
    └── NothingTrainedError     a training stage ended without the optimiser steps that it planned

A failure of one generation, judgement or row is *data*, not an exception: see `chains.ParseFailure`.
"""


class PGenRMError(Exception):
    """Base of every user-facing error; its text is one sentence with the remedy."""


class ConfigError(PGenRMError, ValueError):
    """A configuration key, value or combination is wrong."""


class DataError(PGenRMError, ValueError):
    """Input data is missing, empty, truncated or of another schema.

    The text names file, row, field and expectation.
    """


class ArtifactError(PGenRMError):
    """A run folder, checkpoint or cache is missing, foreign or incomplete."""


class PreflightError(PGenRMError):
    """The machine lacks something that the run needs."""


class BackendError(PGenRMError):
    """An engine or server failed and the stage cannot continue."""


class EngineLostError(BackendError):
    """An engine died or stopped moving; a restart may not meet the same end."""


class NodeLostError(EngineLostError):
    """A node of the cluster was lost; the stage resumes from its newest checkpoint once the node is back."""


class NothingTrainedError(PGenRMError):
    """A training stage made fewer optimiser steps than it planned."""


def first_line(error: BaseException) -> str:
    """First line of an error's text, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def last_line(error: Exception) -> str:
    """Last line of an error's text, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
