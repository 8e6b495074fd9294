"""Entry points: notebooks, the command line, and their environment variables."""
