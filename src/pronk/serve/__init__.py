"""Text in and out: chat templates, incremental decoding, tools, and the server around them."""
