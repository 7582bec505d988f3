"""Files in the memory of keepers, by ``memory://`` names: how keepers are found and asked, and how files are read."""

SCHEME = "memory://"
