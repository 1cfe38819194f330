"""Names and order of the stages, as typed on the command line and as folders of a run."""

from enum import StrEnum


class StageName(StrEnum):
    """Stages in the order in which a run needs them."""

    BUILD_DATA = "build_data"
    CRITERIA = "criteria"
    BUILD_SEC = "build_sec"
    PSI = "psi"
    CRE = "cre"
    CURRICULUM = "curriculum"
    PROTOTYPES = "prototypes"
    EVALUATE = "evaluate"
    LABEL = "label"
    BEST_OF_N = "best_of_n"

    @property
    def starts_from(self) -> tuple["StageName", ...]:
        """Training stages before this one, newest first; the first complete one provides the checkpoint."""
        order = list(StageName)
        return tuple(stage for stage in reversed(TRAINED) if order.index(stage) < order.index(self))


GRPO_STAGES = (StageName.CRE, StageName.CURRICULUM)
TRAINED = (StageName.PSI, *GRPO_STAGES)  # they make a checkpoint
CHOOSING = (StageName.LABEL, StageName.BEST_OF_N)  # they choose among responses, with a finished model
# Stages of every pipeline; CRE runs `criteria` too if `sec.synthesize_criteria` is set.
STAGES = tuple(stage for stage in StageName if stage not in (StageName.CRITERIA, *CHOOSING))
PLANNED = STAGES[1:]  # building data needs no plan
