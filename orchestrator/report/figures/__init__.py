"""Figures of a sweep's tables: functions from Arrow tables to matplotlib axes, one file a question."""
