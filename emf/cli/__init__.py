"""The `emf` commands, one file a group. Nothing imports it."""
