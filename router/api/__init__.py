"""The public APIs: gRPC and OpenAI over HTTP, and what both know of a call."""
