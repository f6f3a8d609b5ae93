"""A demo that needs no network: emoji with captions, small models, a config, and a tour of the result."""
