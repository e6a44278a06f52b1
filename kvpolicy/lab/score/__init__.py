"""Figures of drawn images: how they compare with real ones, and with what was asked for."""
