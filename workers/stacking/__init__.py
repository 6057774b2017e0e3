"""What makes further training fast: replicas in a stack, folded batches, traced steps, and what is known of a forward."""
