"""The zoos that ship: models at pinned revisions, and every choice about them, as TOML."""
