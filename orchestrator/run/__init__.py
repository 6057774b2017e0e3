"""Running a sweep: plan, tasks, schedule, the pool on Ray, reduction."""
