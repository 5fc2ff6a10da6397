"""What NumPy bodies share: threads, and memory that is used again."""
