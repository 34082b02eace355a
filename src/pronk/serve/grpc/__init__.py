"""The server's gRPC side: Pronk's own service, and the Open Inference Protocol."""
