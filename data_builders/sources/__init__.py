"""Sources of preference data: one module with `build` per source; `recipes/build_data.py` picks one."""
