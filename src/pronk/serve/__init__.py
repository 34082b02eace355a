"""Text in and out: chat templates and incremental decoding."""
