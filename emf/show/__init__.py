"""Pages, sheets, plots and tables: one way to draw each."""
