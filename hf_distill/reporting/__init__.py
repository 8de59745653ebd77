"""Tables, plots, reports, model cards, and publishing."""
