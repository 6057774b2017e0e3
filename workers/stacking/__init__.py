"""What makes further training fast: stacked replicas, folded batches, traced steps."""
