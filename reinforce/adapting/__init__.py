"""Released students adapted to new data: weights mixed between models, and what each mixture gains and loses."""
