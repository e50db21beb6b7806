"""What a session's tokens chose, recorded: in memory, packed, and in files."""
