"""One student, one cohort: objective, step, loop."""
