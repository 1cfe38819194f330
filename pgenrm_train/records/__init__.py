"""Records of votes: pairs, their rows and files."""

from typing import TYPE_CHECKING

from pgenrm_train.lazy import lazily

if TYPE_CHECKING:
    from pgenrm_train.records.pairs import PreferencePair
    from pgenrm_train.records.rows import read_pairs

__all__ = ["PreferencePair", "read_pairs"]
__getattr__ = lazily(__name__, pairs=["PreferencePair"], rows=["read_pairs"])
