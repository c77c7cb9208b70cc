"""What people do with models besides training and evaluating them."""
