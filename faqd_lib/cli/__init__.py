"""How the suite is called: from a notebook, from the command line."""
