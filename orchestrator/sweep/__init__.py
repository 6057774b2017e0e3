"""A sweep in its store: every key, the manifest, parts, blocks of estimates, imported scores."""
