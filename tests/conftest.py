"""Give generated examples no time limit: first imports and a busy machine are slow."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
