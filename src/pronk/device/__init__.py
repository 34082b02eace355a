"""The machine and what fits on it: planning, measuring and fitting a model to a budget."""
