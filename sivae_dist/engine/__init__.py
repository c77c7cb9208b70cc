"""Training: the loop, its phases, what it writes and how it resumes."""
