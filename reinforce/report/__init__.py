"""Reports on datasets, as tables, JSON and plots."""
