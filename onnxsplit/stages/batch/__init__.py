"""The batch axis: where the rows of a batch go in a model, by the structure of its ops and by trials."""
