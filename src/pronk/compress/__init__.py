"""Smaller weights: how tensors are quantized. One of the two rooms that may import torch."""
