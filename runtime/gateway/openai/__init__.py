"""An endpoint for clients of OpenAI's API: completions, conversations and their streams."""
