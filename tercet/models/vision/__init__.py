"""What makes embeddings of images: `config` says what a tower is, `config_hf` reads it, `loader` builds a `tower`,
whose geometry is in `grid`; `processor` makes patches of pixels, by the model's own transformers processor."""
