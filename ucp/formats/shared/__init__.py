"""What several formats need: renaming, shards of bounded size, torch files, the roles of state-dict entries."""
