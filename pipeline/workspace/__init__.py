"""What every command stands on: paths, files, processes, errors and named random draws."""
