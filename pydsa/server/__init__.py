"""The HTTP server: OpenAI's and Anthropic's APIs in front of an Engine.

Importing this package imports nothing else; its modules need the extra `serve`.
"""
