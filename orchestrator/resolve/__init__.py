"""From a spec to what a number depends on: workload, θᶠ, digests."""
