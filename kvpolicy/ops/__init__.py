"""One function an operation: a plain reference in each, faster backends beside it."""
