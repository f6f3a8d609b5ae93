"""Labels that travel without images: identities of images, and the index from identity to shard and row."""
