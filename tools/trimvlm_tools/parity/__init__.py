"""Parity: does the engine still compute what PyTorch did? Rung by rung, as a gate (`trimvlm check`)."""
