"""How ops run: arguments, tasks, a team of threads, weights read ahead."""
