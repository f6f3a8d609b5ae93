"""Teachers and captioners that are classes of the user's."""
