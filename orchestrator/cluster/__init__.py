"""A Ray cluster from outside: its head, jobs, what is staged for them, its checks."""
