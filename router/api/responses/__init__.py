"""POST /v1/responses: the part of OpenAI's Responses API that keeps nothing between two requests."""
