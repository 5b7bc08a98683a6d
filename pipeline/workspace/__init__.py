"""What every command stands on: paths, files, processes and how they are stopped, errors and named random draws."""
