"""Everybody who computes the loss, on the same inputs, in turns: time, memory, errors, whole steps."""
