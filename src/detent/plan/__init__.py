"""The plan: every tensor's fate, decided before a weight is read."""
