"""How model families write reasoning and tool calls into their answers, and how to read it as it comes."""
