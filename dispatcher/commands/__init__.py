"""What an operator types: one file for each command or family of commands."""
