"""A demo that needs no network: emoji with captions, small models, a config, and a view of the result."""
