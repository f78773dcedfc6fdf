"""Fast forms of what chapters teach plainly: the same numbers, tested; they import nothing from the chapters."""
