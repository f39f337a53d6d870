"""The statistics of a search: arrays in, arrays out, with no notion of architectures or trials."""
