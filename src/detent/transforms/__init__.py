"""Changes of weights that preserve what the model computes: folds and rotations."""
