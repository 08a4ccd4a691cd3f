"""Files of tensors, read without trusting them."""
