"""The steps of docs/reproduce.md with small stand-ins: published labels in, a student, its evaluation, a comparison."""
