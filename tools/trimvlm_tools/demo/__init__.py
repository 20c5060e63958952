"""`trimvlm demo`: every step of the pipeline on the demo model, dense against pruned, in one table."""
