"""Tables, claims, charts and the report."""
