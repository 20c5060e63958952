"""Doctor: what of this machine matters to trimvlm (`facts`), and what to do about it (`checks`)."""
