"""The vLLM adapter. Not written yet: nothing here is registered, and importing it does nothing."""
