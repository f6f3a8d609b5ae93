"""Datasets in the formats of other programs: DataCompDR's tars, clip-retrieval's embeddings, Hugging Face's cards."""
