"""The one way from captions to pictures."""
