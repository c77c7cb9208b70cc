"""Applications: what people do with data and trained models beyond training itself."""
