"""Generated examples have no time limit: what is slow is the first import, or another program on the machine."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
