"""Everything that reads or rewrites a traced program."""
