"""The operations, one a file; the package above imports and so registers them."""
