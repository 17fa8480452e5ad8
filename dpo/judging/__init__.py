"""Which of two responses is better: judges, and the statistics of their verdicts."""
