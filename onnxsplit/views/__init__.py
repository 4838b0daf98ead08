"""Views of models and plans for people: reports, annotated models, inspections, and the diagnosis of a host."""
