"""The workers that a router knows, its connections to them, and the messages between them."""
