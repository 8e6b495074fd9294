"""Datasets from disk, images in memory, and batches for training."""
