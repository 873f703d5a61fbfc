"""OpenAI's completions and chats: their options, requests and answers."""
