"""The steps of docs/recipes.md with small stand-ins: published labels in, a student, its evaluation, a comparison."""
