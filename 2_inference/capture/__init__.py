"""Everything that runs the studied model: prompts, recorder, decoding, batches, files."""
