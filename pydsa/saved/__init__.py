"""Rows of conversations that are kept: in files, in logs, and as prefixes.

Other conversations that begin alike share the prefixes.
"""
