"""A model as plain data: typed values, ops, passes that preserve meaning, and a reference."""
