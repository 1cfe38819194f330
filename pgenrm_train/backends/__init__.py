"""Engines: one package per framework that trains, generates, embeds or judges.

They import `protocols.py`, `ray/` and every package below `backends` in docs/architecture.md, never a
sibling.  For a new engine, add a package that fulfils a protocol, and pick it in `recipes/wiring/`.
"""
