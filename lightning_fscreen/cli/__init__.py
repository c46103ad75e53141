"""The commands: `fscreen`, `fscreen-bench`, what they write and draw."""
