"""Evaluation: query the models, compute metrics, run studies and write the report.

It imports `pgenrm_train` without the engines, and never `data_builders` or `recipes`.  Add a baseline to
`ask/`, a metric to `metrics/`, a probe or study to `studies/`, a section of the report to `report/`.
"""
