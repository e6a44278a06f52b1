"""Drawing many images from one checkpoint: prompts in, a folder of pictures out."""
