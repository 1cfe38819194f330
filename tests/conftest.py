"""Generated examples have no time limit, as a busy machine is slow.  Ray collects no metrics."""

import os

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Ray's agents would record every histogram sample again, which on two cores takes longer than the tests.
os.environ["RAY_enable_metrics_collection"] = "0"  # noqa: SIM112  (Ray spells it so)
