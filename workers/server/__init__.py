"""What routers talk to: the gRPC service of a worker, its block events and its lease."""
