"""LaMP-QA: ranking by rubric."""
