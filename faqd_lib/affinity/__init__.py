"""The affinity losses: exact, fast, their statistics, and rival estimators."""
