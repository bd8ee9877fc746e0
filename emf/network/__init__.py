"""From a config to a network: what is built, and what of it is trained."""
