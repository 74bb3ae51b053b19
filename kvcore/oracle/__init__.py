"""What is correct, in NumPy: the ops as loops that a reader can check by eye."""
