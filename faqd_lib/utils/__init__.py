"""Files, measurements, progress: nothing of this field."""
