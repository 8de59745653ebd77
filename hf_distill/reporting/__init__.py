"""What people look at: tables, plots, the report, model cards, and publishing them."""
