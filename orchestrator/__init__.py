"""The sweep: spec, plan, store, driver, reduction, scores and the command line."""
