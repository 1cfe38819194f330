"""Benchmarks of questions with one preferred response: what is asked, counted and shown."""
