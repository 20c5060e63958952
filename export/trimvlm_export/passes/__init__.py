"""Graph edits: one pass in one file, each with its own test on a graph of a few nodes."""
