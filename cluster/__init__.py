"""Where it runs: the command line, the one runtime environment, submission."""
