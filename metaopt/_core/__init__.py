"""Types, trees, checks of arguments, and results: the ground that all else stands on."""
