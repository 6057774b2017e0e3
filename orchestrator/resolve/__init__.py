"""From a spec to what a number depends on: workload, θᶠ, digests."""

UPLOADED = "FIMO_UPLOADED"
"""Of a worker's environment: its working directory holds the code that came with the job."""
