"""Text for decoders: tokenizers, chat templates, and the text of the tokens that a pipeline generates."""
