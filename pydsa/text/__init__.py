"""What is said: tokens, chat templates, answers, calls of tools, and grammars."""
