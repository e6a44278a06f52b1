"""One generation: its layers, their slots, and who decides about them."""
