"""The page of a report: a template with its style and script, and what fills it in."""
