"""What people look at: reports, annotated models and inspections."""
