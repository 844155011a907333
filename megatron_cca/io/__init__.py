"""Files that others may have written, and files that are written as a whole or not at all."""
