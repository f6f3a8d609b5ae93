"""Reports on what was made: numbers for people, as JSON and as plots."""
