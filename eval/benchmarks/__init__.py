"""Benchmarks of questions with one preferred response: questions, measures and tables."""
