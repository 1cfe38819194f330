"""Recipes: one module per command, which picks engines and runs stages.

They may import every package, and none imports them: `pgenrm_train.__main__` loads a recipe by its name.  For
a new command, add a module with `run(config)` and `configs/recipe/NAME.yaml`.  Helpers belong to `wiring/`.
"""
