"""What a bundle will need on a target, before anything is built: see `prediction.predict`."""
