"""The losses as members of other libraries; each module here needs its library and is imported by name."""
