"""One function per stage: read, call the core, write; the only place where IO meets mathematics."""
