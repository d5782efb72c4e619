"""What comes from outside: paths, files, JSON, and folders that are written whole or not at all. Knows no torch."""
