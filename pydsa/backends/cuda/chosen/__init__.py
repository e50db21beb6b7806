"""Attention to chosen rows: of a few tokens, and of prompts."""
