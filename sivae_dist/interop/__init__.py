"""Other formats: published checkpoints, and what their names mean here."""
