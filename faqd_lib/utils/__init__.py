"""Files, measurements, progress and error messages: helpers that know nothing of distillation."""
