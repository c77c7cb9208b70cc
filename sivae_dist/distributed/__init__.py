"""Processes: how they start, how they add up gradients and statistics. Knows nothing of VAEs."""
