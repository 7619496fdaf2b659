"""Optimizers, parameter groups, gradient clipping, schedules and the exponential moving average."""
