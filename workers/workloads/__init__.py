"""The workloads that ship with fimo."""
