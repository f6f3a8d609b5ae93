"""Images in files of their own, at the paths and URLs that a table names."""
