"""Statistics of a search: arrays in, arrays out; knows nothing of architectures or trials."""
