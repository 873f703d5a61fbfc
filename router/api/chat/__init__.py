"""What a chat has that a completion has not: messages, tools, and an answer that may be reasoning and calls."""
