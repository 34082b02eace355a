"""What may be asked and said: filters over the texts of requests and of answers."""
