"""Reading finished runs, and statistics, tables and plots of them."""
