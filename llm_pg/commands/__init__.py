"""The commands that take a config or a run; `cli` reads their arguments."""
