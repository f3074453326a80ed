"""Hooks into model libraries and engines. Nothing here imports them: each hook waits until they are loaded."""
