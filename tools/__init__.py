"""What the build needs to know about this machine; not part of the installed package."""
