"""How an update is represented in a bundle."""
