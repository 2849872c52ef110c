"""Measurements that a sceptic can repeat: what the loss costs beside the code of everyone else who computes it."""
