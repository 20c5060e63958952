"""`trimvlm compare`: every method at matched FLOPs on the same questions."""
