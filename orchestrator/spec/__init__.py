"""The sweep spec: validated values, removals, YAML."""
