"""How good and how fast a model is: perplexity, divergence and latency."""
