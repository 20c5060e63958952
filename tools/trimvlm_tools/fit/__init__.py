"""`trimvlm fit`: what it says, and how its predictions are measured."""
