"""Token ids in, token ids out: requests, scheduling, KV blocks, sampling, the runner."""
