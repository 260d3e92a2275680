"""A run on fake tensors: its models, its batches, its steps, and the meter that counts them."""
