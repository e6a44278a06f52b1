"""The lab: what runs policies against subjects, and shows what came of it."""
