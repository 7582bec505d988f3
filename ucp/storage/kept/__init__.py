"""Files in the memory of keepers, by ``memory://`` names: how they are found, asked and read."""

SCHEME = "memory://"
