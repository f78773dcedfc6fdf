"""Tools of whoever writes the course; they need a clone, and no reader of the package does."""
