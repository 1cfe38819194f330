"""Bodies of the stages, and the registry of what each depends on.

They import protocols and the packages below `stages`, never an engine: a recipe passes it in.  For a new
stage, name it in `config/stage_names.py`, register it in `registry.py` and add its body here.
"""
