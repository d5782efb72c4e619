"""What comes from outside: paths, files, JSON, and folders that are written completely or not at all. No torch here."""
