"""Exact and fast affinity losses, their statistics, and rival estimators."""
