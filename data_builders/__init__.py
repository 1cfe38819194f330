"""Data builders: raw sources to preference pairs, checks of the result, and rule-based teachers.

They import `pgenrm_train` without the engines, and never `eval` or `recipes`.  For a new source, add a module
with `build` to `sources/`.  A rule that teaches or judges belongs to `teachers/`.
"""
