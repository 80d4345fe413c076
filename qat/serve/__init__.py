"""``qat serve``: an OpenAI-compatible server on the packed model."""
