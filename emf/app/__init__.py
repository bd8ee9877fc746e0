"""`emf app`: captions to pictures in a browser, many numbers of steps side by side."""
