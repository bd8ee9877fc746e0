"""Pages, sheets, plots, tables and progress bars: one way to draw each. A text is shown as it is written, whatever
characters it holds."""
