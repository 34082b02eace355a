"""The server's HTTP side: what OpenAI's clients know, pages, and the gate before them."""
