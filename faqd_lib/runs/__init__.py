"""What is trained, and where it is kept."""
