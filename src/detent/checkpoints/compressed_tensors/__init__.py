"""The compressed-tensors format: layout of tensors, names of schemes, and what others write."""
