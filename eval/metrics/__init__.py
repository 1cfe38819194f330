"""Metrics over predictions."""

from typing import TYPE_CHECKING

from pgenrm_train.lazy import lazily

if TYPE_CHECKING:
    from eval.metrics.accuracy import accuracy_report

__all__ = ["accuracy_report"]
__getattr__ = lazily(__name__, accuracy=__all__)
