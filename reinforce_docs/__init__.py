"""The documentation site of `make docs`: pages of the repository, with a reference that is made of the code."""
