"""This machine: its cores, nodes, limits and memory."""
