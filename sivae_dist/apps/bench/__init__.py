"""Measurements of parts. `core` times calls; `kernels` lists the operators' cases."""
