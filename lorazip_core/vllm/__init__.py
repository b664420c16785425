"""A plugin for vLLM that serves bundles; nothing here is imported unless vLLM is there."""
