"""Names of the stages, as on the command line and as folders of a run."""

from __future__ import annotations

from enum import StrEnum


class StageName(StrEnum):
    """Stages in the order of a pipeline; `criteria` runs only with sec.synthesize_criteria=true."""

    BUILD_DATA = "build_data"
    CRITERIA = "criteria"
    BUILD_SEC = "build_sec"
    PSI = "psi"
    CRE = "cre"
    CURRICULUM = "curriculum"
    PROTOTYPES = "prototypes"
    EVALUATE = "evaluate"


STAGES = tuple(stage for stage in StageName if stage is not StageName.CRITERIA)  # of every pipeline
