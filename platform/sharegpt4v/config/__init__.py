"""Configurations: frozen pydantic models, one file per command; importable without torch or Ray."""
