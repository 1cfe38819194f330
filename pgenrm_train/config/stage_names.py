"""Names of the stages, as they are typed on the command line and as folders of a run."""

from __future__ import annotations

from enum import StrEnum


class StageName(StrEnum):
    """Stages in the order in which a pipeline runs them; `criteria` runs only where criteria are to be inferred."""

    BUILD_DATA = "build_data"
    CRITERIA = "criteria"
    BUILD_SEC = "build_sec"
    PSI = "psi"
    CRE = "cre"
    CURRICULUM = "curriculum"
    PROTOTYPES = "prototypes"
    EVALUATE = "evaluate"
