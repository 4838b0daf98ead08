"""The batch axis of each tensor: rules that follow the rows of a batch through a model's ops, and trials on batches."""
