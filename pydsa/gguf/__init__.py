"""GGUF files: read, checked, written, and divided into parts."""
