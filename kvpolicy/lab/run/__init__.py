"""Running policies against subjects, whatever happens on the way."""
