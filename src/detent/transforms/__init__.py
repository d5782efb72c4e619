"""What changes weights and leaves the function of the model alone: folds and rotations."""
