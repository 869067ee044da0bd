"""What measures speed; README.md holds commands, machines and figures."""
