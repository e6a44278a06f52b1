"""Networks that ``kvpolicy score`` looks at images with, read from local files only."""
